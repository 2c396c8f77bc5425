"""The product with a frozen weight in bf16, float32 or NF4: dequantized once for a pass, or read as it
is stored for few rows.

Letters: M rows, I input and O output features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma_ft.kernels.gemv import are_few, gemv
from gemma_ft.kernels.matmul import times, times_transposed
from gemma_ft.kernels.nf4 import dequantize_nf4_for_now, nf4_product


def frozen_product(rows: Tensor, weight: Tensor, state: Any | None) -> Tensor:
    """rows [M, I] times the weight transposed -> [M, O], without a gradient. `weight` [O, I], or NF4 bytes with
    bitsandbytes' QuantState.
    """
    if state is not None:
        return nf4_product(rows, weight, state)
    if weight.dtype == rows.dtype and are_few(rows, len(rows)):
        return gemv(rows, weight)
    return times_transposed(rows, weight.to(rows.dtype))


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, state: Any | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.state = state
        return frozen_product(x, weight, state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return times(upstream, plain(weight, ctx.state, upstream.dtype)), None, None


def frozen_linear(x: Tensor, weight: Tensor, state: Any | None) -> Tensor:
    """x [..., I] -> [..., O]: `frozen_product`, with the gradient of x."""
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = _Frozen.apply(rows, weight, state)
    return out.view(*x.shape[:-1], out.shape[1])


def plain(weight: Tensor, state: Any | None, dtype: torch.dtype) -> Tensor:
    """The weight [O, I] in `dtype`; one in 4 bits is dequantized for this use, on a CPU into memory that the next use
    writes over.
    """
    return (weight if state is None else dequantize_nf4_for_now(weight, state)).to(dtype)


def state_of(layer: Any) -> Any:
    """The QuantState of one of bitsandbytes' 4-bit layers: its weight's, or the layer's own where that lost it."""
    return getattr(layer.weight, "quant_state", None) or layer.quant_state
