"""Real files train by overrides alone; each is read in place and skipped where it is absent."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_ft.recipe.load import LoadedRecipe

RecipeFor = Callable[..., LoadedRecipe]
Train = Callable[..., list[dict[str, Any]]]
REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.parametrize(
    ("name", "overrides", "told"),
    [
        ("gsm8k_train.jsonl", [], "prompt_completion: the rows have question, answer"),
        (
            "gsm8k_train.jsonl",
            ["data.columns.prompt={question}", "data.columns.completion={answer}"],
            "prompt_completion: data.columns names prompt and completion",
        ),
        ("sharegpt_sample.json", [], "sharegpt: the rows have conversations"),
        ("seed_tasks.jsonl", [], "alpaca: the rows have instruction, instances"),
        ("tinyshakespeare.txt", ["data.format=text"], "text: named in the recipe"),
    ],
)
def test_a_real_file_trains(
    recipe_for: RecipeFor, train: Train, tmp_path: Path, name: str, overrides: list[str], told: str
) -> None:
    if not (REAL / name).is_file():
        pytest.skip(f"the real data set {name} is not on this machine")
    lines = train(
        recipe_for(
            f"data.train={REAL / name}", "data.max_seq_len=256", "data.packing=true", "train.max_steps=2", *overrides
        )
    )
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    assert told in (tmp_path / "console.txt").read_text()
