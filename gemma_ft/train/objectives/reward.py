"""A reward model by Bradley and Terry's law, arXiv:2203.02155 eq. 1: a number R(y) for each answer, larger for the
chosen one.

    -log sigmoid(R(chosen) - R(rejected) - margin),  a mean over the pairs of a step
    + centering (R(chosen) + R(rejected))^2,  likewise (arXiv:2312.09244 section 2).

margin is the row's own, 0 where it has none (arXiv:2307.09288 eq. 2). The second term keeps rewards near 0, as
differences alone do not say where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from gemma_ft.data.conversation import RowKind
from gemma_ft.train.objectives.answers import halves, pair_figures, row_count, weighted_sum
from gemma_ft.train.objectives.registry import Batch, Figures, Objective


@dataclass(frozen=True)
class BradleyTerry:
    """See the module. Terms: (pairs[, pairs]); it is given the rewards of answers [A] for log-probabilities."""

    centering: float = 0.01

    rows: ClassVar[RowKind] = "pairs"
    needs_logprobs: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False
    needs_baseline: ClassVar[bool] = False
    scores: ClassVar[bool] = True

    def divisors(self, batch: Batch) -> tuple[float, ...]:
        """Pairs, for each term."""
        return (row_count(batch),) * (2 if self.centering > 0 else 1)

    def __call__(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """See `Objective`."""
        chosen, rejected = halves(logprobs.double())
        term = weighted_sum(-logsigmoid(chosen - rejected - batch["margins"].double()), batch)
        if not self.centering > 0:
            return (term,)
        return term, self.centering * weighted_sum((chosen + rejected) ** 2, batch)

    def figures(self, logprobs: Tensor, batch: Batch) -> Figures:
        """Those of pairs."""
        return pair_figures(logprobs, batch)

    def loss_at_start(self, batch: Batch) -> float | None:
        """log(1 + e^margin) for each pair: log 2 where there is no margin."""
        return float(weighted_sum(softplus(batch["margins"].double()), batch))


def build(*, centering: float = 0.01) -> Objective:
    """See the module for its setting."""
    return BradleyTerry(centering)
