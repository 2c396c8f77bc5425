"""Direct preference optimization, arXiv:2305.18290 eq. 7: the chosen answer is to gain on the rejected one, against a
reference.

y an answer, |y| its labelled tokens, d(y) = log p(y) - log q(y) summed over them, q the reference:

    -log sigmoid(beta (d(chosen) - d(rejected))),  a mean over the pairs of a step.

label_smoothing e: (1 - e) times that + e times it of the swapped pair (E. Mitchell, "A note on DPO with noisy
preferences", 2023). length_normalized: d(y) / |y| for d(y), arXiv:2411.15124. sft_weight: so many
times the cross-entropy of the chosen answers is added, a mean over their tokens in a step (arXiv:2404.19733,
which divides each by its own length).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

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
class DirectPreference:
    """See the module. Terms: (pairs[, tokens of chosen answers])."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalized: bool = False
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
        ratios = log_ratios(logprobs, batch)
        chosen, rejected = halves(ratios / answer_lengths(batch) if self.length_normalized else ratios)
        margin = self.beta * (chosen - rejected)
        losses = -(1 - self.label_smoothing) * logsigmoid(margin) - self.label_smoothing * logsigmoid(-margin)
        term = weighted_sum(losses, batch)
        return (term, self.sft_weight * chosen_nll(logprobs, batch)) if self.sft_weight > 0 else (term,)

    def figures(self, logprobs: Tensor, batch: Batch) -> Figures:
        """Those of `reference_figures`: the reward of an answer is beta d(y), also where the loss is of d(y) / |y|."""
        return reference_figures(logprobs, batch, self.beta)

    def loss_at_start(self, batch: Batch) -> float | None:
        """log 2 for each pair."""
        return math.log(2) * row_count(batch)


def build(
    *, beta: float = 0.1, label_smoothing: float = 0.0, length_normalized: bool = False, sft_weight: float = 0.0
) -> Objective:
    """See the module for its settings."""
    return DirectPreference(beta, label_smoothing, length_normalized, sft_weight)
