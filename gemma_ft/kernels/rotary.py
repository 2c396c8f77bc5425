"""Rotary positions: the half-split rotation of queries and keys, from the layout of a projection to that of attention.

Letters: B batch, T tokens, H head dim.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma_ft.kernels import cpp_backend
from gemma_ft.kernels.triton import triton_backend as gpu


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, heads, T, H] by its positions: computed in the angles' dtype, returned in x.dtype.

    cos and sin [B or 1, 1, T, H], the second half as the first, in float32 or wider.
    Source: arXiv:2104.09864 eq. 15, half-split layout of google/gemma_pytorch.
    """
    on_gpu = gpu.serves(x) and gpu.serves(cos, sin)
    served = on_gpu or (cpp_backend.serves(x) and cpp_backend.serves(cos, sin))
    if served and cos.dtype == torch.float32 and _fits(x, cos, sin):
        out: Tensor = _Rotate.apply(x, cos, sin, on_gpu)
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
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, on_gpu: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.on_gpu = on_gpu
        return _turned(x, x.new_empty(x.shape), cos, sin, 1.0, on_gpu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        batch, heads, tokens, width = upstream.shape
        given = upstream if upstream.stride(-1) == 1 else upstream.contiguous()
        # laid out as the projection's output is, so that its backward need not copy
        grad = upstream.new_empty((batch, tokens, heads, width)).transpose(1, 2)
        cos, sin = ctx.saved_tensors
        return _turned(given, grad, cos, sin, -1.0, ctx.on_gpu), None, None, None


def _turned(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, sign: float, on_gpu: bool) -> Tensor:
    """`out`, filled with x turned by the angles (sign -1: turned back)."""
    cos, sin = cos.contiguous(), sin.contiguous()
    if on_gpu:
        from gemma_ft.kernels.triton import rotary as kernel

        kernel.turn(x, cos, sin, out, sign)
        return out
    of_row = 0 if cos.shape[0] == 1 else cos.stride(0)
    strides = [(ctypes.c_int64 * 3)(*one.stride()[:3]) for one in (x, out)]
    cpp_backend.call("rotate", x, cos, sin, out, *x.shape, *strides, of_row, sign, of=x.dtype)
    return out
