"""The product with a weight that is trained in float32 while rows are bf16: what autocast does to it on a CPU, but the
weight's narrow copy is made anew for backward instead of being kept, and products are in the dtype that the processor
multiplies fastest (matmul.py).

Letters: M rows, I input and O output features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma_ft.kernels.matmul import MANY, serves, times, times_transposed, widened_gradient
from gemma_ft.kernels.plain_tensors import are_plain
from gemma_ft.system import environment


def takes_trained(x: Tensor, weight: Tensor) -> bool:
    """Whether autocast would narrow this weight for these rows, and `trained_linear` does it in its place: many rows on
    a CPU. The same with a gradient and without.
    """
    return (
        weight.dtype == torch.float32
        and x.dtype == torch.bfloat16
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and x.numel() >= MANY * x.shape[-1]
        and are_plain(x)
        and are_plain(weight)
        and environment.own_kernels_wanted()
    )


def trained_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., I] in bf16, weight [O, I] in float32 -> [..., O] in bf16; the weight's gradient is float32."""
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = _Trained.apply(rows, weight)
    return out.view(*x.shape[:-1], len(weight))


class _Trained(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        with torch.autocast("cpu", enabled=False):
            return times_transposed(rows, weight.to(rows.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        grad_rows = grad_weight = None
        with torch.autocast("cpu", enabled=False):
            if ctx.needs_input_grad[0]:
                grad_rows = times(upstream, weight.to(rows.dtype))
            if ctx.needs_input_grad[1]:
                grad_weight = gradient_of_weight(upstream, rows)
        return grad_rows, grad_weight


def gradient_of_weight(upstream: Tensor, rows: Tensor) -> Tensor:
    """upstream [M, O], rows [M, I] -> upstreamᵀ rows [O, I] in float32; of a product in bf16 it is rounded before."""
    if serves(upstream, rows):
        return widened_gradient(upstream, rows)
    return (upstream.T @ rows).float()
