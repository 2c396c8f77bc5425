"""Our trainer around a model and rows that a benchmark has made itself, without a recipe."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from benchmarks.hundred_million import tokenizer


class Rows(list):  # type: ignore[type-arg]
    """Rows as our trainer takes them, in their order."""

    streamed, weighted = True, False

    @property
    def lengths(self) -> list[int]:
        return [len(one["input_ids"]) for one in self]

    def state(self, row: int) -> dict[str, Any]:
        return {}


def trainer_of(
    model: Any, settings: Any, rows: Iterable[dict[str, list[int]]], autocast: torch.dtype | None = None
) -> Any:
    """A GemmaTrainer with TRL's `settings` that tells nobody anything."""
    from gemma_ft.data.pack.collate import Collator
    from gemma_ft.train.distributed import World
    from gemma_ft.train.signals import StopRequest
    from gemma_ft.train.trainer import GemmaTrainer, Progress

    return GemmaTrainer(
        model, settings, world=World(), stop=StopRequest(), source=None, train_examples=Rows(rows),
        eval_examples=None, collator=Collator(0), tokenizer=tokenizer(), schedule="constant", warmup_ratio=0.0,
        autocast=autocast, keep_checkpoints=1, keep_best=False, progress=Progress(), on_step=lambda figures: None,
        on_eval=lambda step, loss: None, on_fault=lambda line: None,
    )  # type: ignore[arg-type]  # fmt: skip
