"""Tokens that several sequences begin with, computed once: what is the same of all of them (embedding, norms, products)
is computed of the distinct tokens of a batch, and attention of each sequence by itself. Padding is not computed either.

Letters: B sequences, T tokens, M distinct tokens of a batch, R tokens that were computed for another sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class SharedTokens:
    """places int64 [B, T]: which of the distinct tokens stands where, that of padding being any. firsts int64 [M]: for
    each of them a place in the flat batch. repeats int64 [R]: the other places that are no padding, none for the same
    token as another.
    """

    places: Tensor
    firsts: Tensor
    repeats: Tensor

    def distinct(self, of_batch: Tensor) -> Tensor:
        """[B, T, ...] -> [1, M, ...]."""
        if not of_batch.is_floating_point():
            return of_batch.flatten(0, 1)[self.firsts][None]
        found: Tensor = _Distinct.apply(of_batch.flatten(0, 1), self.firsts)
        return found[None]

    def spread(self, distinct: Tensor) -> Tensor:
        """[1, M, ...] -> [B, T, ...]."""
        found: Tensor = _Spread.apply(distinct[0], self.places.flatten(), self.firsts, self.repeats)
        return found.view(*self.places.shape, *distinct.shape[2:])


class _Distinct(torch.autograd.Function):
    """Rows [B T, ...] -> those at `firsts`; the others have no gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, firsts: Tensor) -> Tensor:
        ctx.save_for_backward(firsts)
        ctx.rows = len(rows)
        return rows.index_select(0, firsts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (firsts,) = ctx.saved_tensors
        found = grad.new_zeros(ctx.rows, *grad.shape[1:])
        return found.index_copy_(0, firsts, grad), None


class _Spread(torch.autograd.Function):
    """Rows [M, ...] -> [B T, ...]. The gradient of a row is the sum of those of the two places where it may stand: no
    order of a sum is left to chance.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, firsts: Tensor, repeats: Tensor) -> Tensor:
        ctx.save_for_backward(places, firsts, repeats)
        return rows.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        places, firsts, repeats = ctx.saved_tensors
        found = grad.index_select(0, firsts)
        again = places[repeats]
        found[again] += grad.index_select(0, repeats)
        return found, None, None, None
