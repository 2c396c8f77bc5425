"""Kahneman-Tversky optimization, arXiv:2402.01306 eq. 7: answers that are good or bad by themselves, of which each is
to move from where a typical answer stands.

y an answer, d(y) = log p(y) - log q(y) summed over its labelled tokens, q the reference, z the baseline, a constant:

    desirable_weight (1 - sigmoid(beta (d(y) - z))) of a good one, undesirable_weight (1 - sigmoid(beta (z - d(y))))
    of a bad one;  a mean over the rows of a step.

z = max(0, mean of log p - log q over mismatched pairs of prompt and answer) is of all rows of a step: it is found
before, and given (`kl_baseline`). The two weights are in the loss alone, not in what it is divided by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gemma_ft.data.conversation import RowKind
from gemma_ft.train.objectives.answers import answer_lengths, log_ratios, row_count, summed_logprobs, weighted_sum
from gemma_ft.train.objectives.registry import Batch, Figures, Objective


@dataclass(frozen=True)
class KahnemanTversky:
    """See the module. Terms: (rows)."""

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    rows: ClassVar[RowKind] = "labelled"
    needs_logprobs: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    needs_baseline: ClassVar[bool] = True
    scores: ClassVar[bool] = False

    def divisors(self, batch: Batch) -> tuple[float, ...]:
        """Rows."""
        return (row_count(batch),)

    def __call__(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """See `Objective`."""
        ahead = log_ratios(logprobs, batch) - batch["kl_baseline"].double()
        signed = torch.where(batch["sides"] == 1, ahead, -ahead)
        return (weighted_sum(self._weights(batch) * torch.sigmoid(-self.beta * signed), batch),)

    def figures(self, logprobs: Tensor, batch: Batch) -> Figures:
        """Under TRL's names: rewards beta d(y), log-probabilities and lengths of good ("chosen") and bad ("rejected")
        answers, each a mean over its own; `kl` is z.
        """
        ratios, good = log_ratios(logprobs.detach(), batch), batch["sides"] == 1
        of_answers = {
            "rewards": self.beta * ratios,
            "logps": summed_logprobs(logprobs.detach(), batch),
            "lengths": answer_lengths(batch),
        }
        found = {}
        for side, members in (("chosen", good), ("rejected", ~good)):
            for name, values in of_answers.items():
                found[f"{name}/{side}"] = (float(values[members].sum()), float(members.sum()))
        rows = float(len(good))
        return {**found, "kl": (float(batch["kl_baseline"]) * rows, rows)}

    def loss_at_start(self, batch: Batch) -> float | None:
        """Half the weight of each row, where z is 0."""
        return float(weighted_sum(self._weights(batch) / 2, batch))

    def _weights(self, batch: Batch) -> Tensor:
        good = (batch["sides"] == 1).double()
        return self.desirable_weight * good + self.undesirable_weight * (1 - good)


def build(*, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Objective:
    """See the module for its settings."""
    return KahnemanTversky(beta, desirable_weight, undesirable_weight)
