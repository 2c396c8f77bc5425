"""Rotary positions: the half-split rotation of queries and keys, from the layout of a projection to that of attention.

Letters: B batch, T tokens, H head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma_ft.kernels.backend import Implementation, implementation_of


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, heads, T, H] by its positions: computed in the angles' dtype, returned in x.dtype.

    cos and sin [B or 1, 1, T, H], the second half as the first, in float32 or wider.
    Source: arXiv:2104.09864 eq. 15, half-split layout of google/gemma_pytorch.
    """
    chosen = implementation_of("rotary", x, fits=cos.dtype == torch.float32 and _fits(x, cos, sin))
    if chosen.name == "torch" or not chosen.serves(cos, sin):
        return rotate_reference(x, cos, sin)
    out: Tensor = _Rotate.apply(x, cos, sin, chosen)
    return out


def _fits(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the shapes are those that are promised above: the operation broadcasts nothing else."""
    if x.dim() != 4 or x.stride(-1) != 1 or cos.shape != sin.shape or cos.dim() != 4:
        return False
    return cos.shape[0] in (1, x.shape[0]) and cos.shape[1:] == (1, *x.shape[2:])


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same in plain torch."""
    wide = x.to(cos.dtype)
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, chosen: Implementation) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.chosen = chosen
        return _turned(x, x.new_empty(x.shape), cos, sin, 1.0, chosen)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        batch, heads, tokens, width = upstream.shape
        given = upstream if upstream.stride(-1) == 1 else upstream.contiguous()
        # laid out as the projection's output is, so that its backward need not copy
        grad = upstream.new_empty((batch, tokens, heads, width)).transpose(1, 2)
        cos, sin = ctx.saved_tensors
        return _turned(given, grad, cos, sin, -1.0, ctx.chosen), None, None, None


def _turned(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, sign: float, chosen: Implementation) -> Tensor:
    """`out`, filled with x turned by the angles (sign -1: turned back)."""
    chosen.run(x, cos.contiguous(), sin.contiguous(), out, sign)
    return out
