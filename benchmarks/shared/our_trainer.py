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
    model: Any,
    settings: Any,
    rows: Iterable[dict[str, list[Any]]],
    autocast: torch.dtype | None = None,
    *,
    kind: str = "sft",
    reference: str = "none",
) -> Any:
    """A GemmaTrainer with TRL's `settings`, whose accumulation becomes ours, that tells nobody anything. kind: of the
    objective, whose rows these are; reference: as `Reference` has its kinds.
    """
    from gemma_ft.data.pack.collate import Collator
    from gemma_ft.data.pack.collate_preferences import PreferenceCollator
    from gemma_ft.recipe.batch_plan import BatchPlan
    from gemma_ft.train.distributed import World
    from gemma_ft.train.objectives.registry import build_objective
    from gemma_ft.train.progress import Progress
    from gemma_ft.train.reference import Reference
    from gemma_ft.train.sampler import TrainingData
    from gemma_ft.train.settings import TrainerOptions
    from gemma_ft.train.signals import StopRequest
    from gemma_ft.train.trainer import GemmaTrainer

    size, times = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    settings.gradient_accumulation_steps = 1
    objective = build_objective(kind)
    collate: Any = Collator(0) if objective.rows == "answers" else PreferenceCollator(0)
    return GemmaTrainer(
        model, settings, data=TrainingData(Rows(rows), None, collate), batch=BatchPlan(size * times, size, times),
        objective=objective, reference=Reference(reference), options=TrainerOptions(autocast=autocast), tokenizer=tokenizer(),
        world=World(), stop=StopRequest(), source=None, progress=Progress(),
    )  # type: ignore[arg-type]  # fmt: skip
