"""Rotary positions: the half-split rotation of queries and keys, from the layout of a projection to that of attention.

Letters: B batch, T tokens, H head dim.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma_ft.kernels import native


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, heads, T, H] by its positions: computed in the angles' dtype, returned in x.dtype.

    cos and sin [B or 1, 1, T, H], the second half as the first, in float32 or wider.
    Source: arXiv:2104.09864 eq. 15, half-split layout of google/gemma_pytorch.
    """
    if native.serves(x) and native.serves(cos, sin) and cos.dtype == torch.float32 and _fits(x, cos, sin):
        out: Tensor = _Rotate.apply(x, cos, sin)
        return out
    return rotate_reference(x, cos, sin)


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
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, torch.empty(x.shape, dtype=x.dtype), cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        batch, heads, tokens, width = upstream.shape
        given = upstream if upstream.stride(-1) == 1 else upstream.contiguous()
        # laid out as the projection's output is, so that its backward need not copy
        grad = torch.empty((batch, tokens, heads, width), dtype=upstream.dtype).transpose(1, 2)
        cos, sin = ctx.saved_tensors
        return _turned(given, grad, cos, sin, -1.0), None, None


def _turned(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """`out`, filled with x turned by the angles (sign -1: turned back)."""
    cos, sin = cos.contiguous(), sin.contiguous()
    of_row = 0 if cos.shape[0] == 1 else cos.stride(0)
    strides = [(ctypes.c_int64 * 3)(*one.stride()[:3]) for one in (x, out)]
    native.call("rotate", x, cos, sin, out, *x.shape, *strides, of_row, sign, of=x.dtype)
    return out
