"""Our trainer around a model and rows that a benchmark has made itself, without a recipe."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from benchmarks.shared.hundred_million import tokenizer


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
    """A GemmaTrainer with TRL's `settings`, whose accumulation becomes ours, that tells nobody anything."""
    from gemma_ft.data.pack.collate import Collator
    from gemma_ft.recipe.batch_plan import BatchPlan
    from gemma_ft.train.distributed import World
    from gemma_ft.train.objectives.registry import build_objective
    from gemma_ft.train.progress import Progress
    from gemma_ft.train.sampler import TrainingData
    from gemma_ft.train.settings import TrainerOptions
    from gemma_ft.train.signals import StopRequest
    from gemma_ft.train.trainer import GemmaTrainer

    size, times = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    settings.gradient_accumulation_steps = 1
    return GemmaTrainer(
        model, settings, data=TrainingData(Rows(rows), None, Collator(0)), batch=BatchPlan(size * times, size, times),
        objective=build_objective("sft"), options=TrainerOptions(autocast=autocast), tokenizer=tokenizer(),
        world=World(), stop=StopRequest(), source=None, progress=Progress(),
    )  # type: ignore[arg-type]  # fmt: skip
