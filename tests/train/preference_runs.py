"""Small runs over pairs, for tests: rows, recipes, and an adapter that supervised fine-tuning left."""

from __future__ import annotations

import json
from pathlib import Path

from gemma_ft.recipe.load import LoadedRecipe
from tests.train.conftest import small_recipe

KEYS = ["train.precision=float32", "train.learning_rate=0.003", "train.warmup_ratio=0.0", "train.schedule=constant"]


def write_pairs(path: Path, count: int = 10) -> Path:
    """Pairs of unequal length, whose chosen and rejected answers are the longer ones in turn."""
    lines = [
        json.dumps(
            {
                "prompt": f"What is {n} plus {n}?" + " Please." * (n % 4),
                "chosen": f"It is {2 * n}." + " Yes." * (n % 3),
                "rejected": f"No idea {n}." + " No." * ((n + 1) % 4),
            }
        )
        for n in range(count)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def preference_recipe(weights: Path, pairs: Path, out: Path, kind: str, *overrides: str) -> LoadedRecipe:
    """A run of an objective in float32, whose steps show in its losses."""
    return small_recipe(weights, pairs, out, f"objective.kind={kind}", "data.eval=null", *KEYS, *overrides)
