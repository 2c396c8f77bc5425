"""Simple preference optimization, arXiv:2405.14734 eq. 6: the chosen answer's mean log-probability is to be ahead of
the rejected one's by a margin. There is no reference.

y an answer, |y| its labelled tokens, a(y) = log p(y) / |y|:

    -log sigmoid(beta a(chosen) - beta a(rejected) - gamma),  a mean over the pairs of a step.

sft_weight: as in dpo.py; it is 0 in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from gemma_ft.data.conversation import RowKind
from gemma_ft.train.objectives.answers import (
    answer_lengths,
    chosen_nll,
    halves,
    logprob_figures,
    pair_divisors,
    pair_figures,
    summed_logprobs,
    weighted_sum,
)
from gemma_ft.train.objectives.registry import Batch, Figures, Objective


@dataclass(frozen=True)
class SimplePreference:
    """See the module. Terms: (pairs[, tokens of chosen answers])."""

    beta: float = 2.0
    gamma: float = 1.0
    sft_weight: float = 0.0

    rows: ClassVar[RowKind] = "pairs"
    needs_logprobs: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False
    needs_baseline: ClassVar[bool] = False
    scores: ClassVar[bool] = False

    def divisors(self, batch: Batch) -> tuple[float, ...]:
        """Pairs, and tokens of chosen answers where they have a term."""
        return pair_divisors(batch, sft=self.sft_weight > 0)

    def __call__(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """See `Objective`."""
        chosen, rejected = halves(self._rewards(logprobs, batch))
        term = weighted_sum(-logsigmoid(chosen - rejected - self.gamma), batch)
        return (term, self.sft_weight * chosen_nll(logprobs, batch)) if self.sft_weight > 0 else (term,)

    def figures(self, logprobs: Tensor, batch: Batch) -> Figures:
        """Those of pairs: the reward of an answer is beta a(y), which is of a token already."""
        rewards = self._rewards(logprobs.detach(), batch)
        return {**pair_figures(rewards, batch), **logprob_figures(logprobs, batch)}

    def loss_at_start(self, batch: Batch) -> float | None:
        """It has no reference."""
        return None

    def _rewards(self, logprobs: Tensor, batch: Batch) -> Tensor:
        return self.beta * summed_logprobs(logprobs, batch) / answer_lengths(batch)


def build(*, beta: float = 2.0, gamma: float = 1.0, sft_weight: float = 0.0) -> Objective:
    """See the module for its settings."""
    return SimplePreference(beta, gamma, sft_weight)
