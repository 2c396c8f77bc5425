"""Identity preference optimization, arXiv:2310.12036 eq. 17: the chosen answer is to be ahead of the rejected one by so
much, and no more.

y an answer, |y| its labelled tokens, d(y) = log p(y) - log q(y) summed over them, q the reference:

    (d(chosen) / |chosen| - d(rejected) / |rejected| - 1 / (2 beta))^2,  a mean over the pairs of a step.

The paper's equation has d(y) itself; its authors computed, and TRL computes, the mean over the tokens of an answer,
which keeps the target the same for answers of any length. sft_weight: as in dpo.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gemma_ft.data.conversation import RowKind
from gemma_ft.train.objectives.answers import (
    answer_lengths,
    chosen_nll,
    halves,
    log_ratios,
    pair_divisors,
    reference_figures,
    row_count,
    weighted_sum,
)
from gemma_ft.train.objectives.registry import Batch, Figures, Objective


@dataclass(frozen=True)
class IdentityPreference:
    """See the module. Terms: (pairs[, tokens of chosen answers])."""

    beta: float = 0.1
    sft_weight: float = 0.0

    rows: ClassVar[RowKind] = "pairs"
    needs_logprobs: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    needs_baseline: ClassVar[bool] = False
    scores: ClassVar[bool] = False

    def divisors(self, batch: Batch) -> tuple[float, ...]:
        """Pairs, and tokens of chosen answers where they have a term."""
        return pair_divisors(batch, sft=self.sft_weight > 0)

    def __call__(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """See `Objective`."""
        chosen, rejected = halves(log_ratios(logprobs, batch) / answer_lengths(batch))
        term = weighted_sum((chosen - rejected - 1 / (2 * self.beta)) ** 2, batch)
        return (term, self.sft_weight * chosen_nll(logprobs, batch)) if self.sft_weight > 0 else (term,)

    def figures(self, logprobs: Tensor, batch: Batch) -> Figures:
        """Those of `reference_figures`: the reward of an answer is beta d(y)."""
        return reference_figures(logprobs, batch, self.beta)

    def loss_at_start(self, batch: Batch) -> float | None:
        """1 / (4 beta^2) for each pair."""
        return row_count(batch) / (4 * self.beta**2)


def build(*, beta: float = 0.1, sft_weight: float = 0.0) -> Objective:
    """See the module for its settings."""
    return IdentityPreference(beta, sft_weight)
