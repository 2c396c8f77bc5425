"""Supervised fine-tuning: the mean cross-entropy of the labelled tokens of a step, each with the weight of its row.

Source: arXiv:2203.02155 section 3.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gemma_ft.data.conversation import RowKind
from gemma_ft.system.limits import IGNORE
from gemma_ft.train.objectives.registry import Batch, Figures, Objective


@dataclass(frozen=True)
class SupervisedFineTuning:
    """Sum of -weight[t] log p[t] over sum of weight[t], t the labelled tokens: a row of weight 2 is the row twice."""

    rows: ClassVar[RowKind] = "answers"
    needs_logprobs: ClassVar[bool] = False  # weight[t] is the derivative
    needs_reference: ClassVar[bool] = False
    needs_baseline: ClassVar[bool] = False
    scores: ClassVar[bool] = False

    def divisors(self, batch: Batch) -> tuple[float, ...]:
        """Labelled tokens, or the sum of their weights."""
        labelled = batch["labels"][:, 1:] != IGNORE  # nothing comes before the first token
        if "loss_weights" not in batch:  # a blank row among weighted ones has no label either
            return (float(labelled.sum()),)
        return (float(batch["loss_weights"][:, 1:][labelled].double().sum()),)

    def __call__(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """See `Objective`."""
        return (-(logprobs * batch["loss_weights"] if "loss_weights" in batch else logprobs).sum(),)

    def figures(self, logprobs: Tensor, batch: Batch) -> Figures:
        """None besides its loss."""
        return {}

    def loss_at_start(self, batch: Batch) -> float | None:
        """It has no reference."""
        return None


def build() -> Objective:
    """It has no settings."""
    return SupervisedFineTuning()
