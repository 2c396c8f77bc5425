"""Odds ratio preference optimization, arXiv:2403.07691 eq. 4 to 7: supervised fine-tuning on the chosen answer, whose
odds are to gain on those of the rejected one. There is no reference.

y an answer, |y| its labelled tokens, a(y) = log p(y) / |y|, log odds(y) = a - log(1 - e^a), beta the paper's lambda:

    -log p of the labelled tokens of the chosen answers, a mean over those tokens in a step
    + beta (-log sigmoid(log odds(chosen) - log odds(rejected))),  a mean over the pairs of a step.

The paper's eq. 1 has the cross-entropy of the answer given the prompt: the prompt's own tokens are in neither term.
log(1 - e^a) is -inf at a = 0, an answer that is sure: a is kept at `SURE` or below, where its derivative is that of a
constant, and how many answers were is a figure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from gemma_ft.data.conversation import RowKind
from gemma_ft.train.objectives.answers import (
    answer_lengths,
    chosen_nll,
    halves,
    logprob_figures,
    means,
    pair_divisors,
    pair_figures,
    summed_logprobs,
    weighted_sum,
)
from gemma_ft.train.objectives.registry import Batch, Figures, Objective

SURE = -1e-6  # the mean log-probability of a token above which an answer's odds are no longer told apart


@dataclass(frozen=True)
class OddsRatioPreference:
    """See the module. Terms: (pairs, tokens of chosen answers)."""

    beta: float = 0.1

    rows: ClassVar[RowKind] = "pairs"
    needs_logprobs: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False
    needs_baseline: ClassVar[bool] = False
    scores: ClassVar[bool] = False

    def divisors(self, batch: Batch) -> tuple[float, ...]:
        """Pairs, and tokens of chosen answers."""
        return pair_divisors(batch, sft=True)

    def __call__(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """See `Objective`."""
        chosen, rejected = halves(log_odds(_mean_logprobs(logprobs, batch)))
        ratio = logsigmoid(chosen - rejected)
        return -self.beta * weighted_sum(ratio, batch), chosen_nll(logprobs, batch)

    def figures(self, logprobs: Tensor, batch: Batch) -> Figures:
        """Those of pairs, the reward of an answer being beta a(y), and TRL's own: `nll_loss`, `log_odds_chosen` (the
        difference of log odds) and `log_odds_ratio` (log sigmoid of it). `log_odds_clamped`: share of sure answers.
        """
        mean = _mean_logprobs(logprobs.detach(), batch)
        chosen, rejected = halves(log_odds(mean))
        more = {"log_odds_chosen": chosen - rejected, "log_odds_ratio": logsigmoid(chosen - rejected)}
        return {
            **pair_figures(self.beta * mean, batch),
            **logprob_figures(logprobs, batch),
            **means({**more, "log_odds_clamped": (mean > SURE).double()}),
            "nll_loss": (float(chosen_nll(logprobs.detach(), batch)), self.divisors(batch)[1]),
        }

    def loss_at_start(self, batch: Batch) -> float | None:
        """It has no reference."""
        return None


def log_odds(mean_logprobs: Tensor) -> Tensor:
    """a -> log(e^a / (1 - e^a)), a kept at `SURE` or below; in float64 to its rounding. Both branches are finite for
    any a, and so is their gradient.
    """
    a = mean_logprobs.clamp(max=SURE)
    return a - torch.where(a > -math.log(2), torch.log(-torch.expm1(a)), torch.log1p(-torch.exp(a)))


def _mean_logprobs(logprobs: Tensor, batch: Batch) -> Tensor:
    return summed_logprobs(logprobs, batch) / answer_lengths(batch)


def build(*, beta: float = 0.1) -> Objective:
    """See the module for its setting."""
    return OddsRatioPreference(beta)
