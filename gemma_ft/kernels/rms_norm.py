"""RMSNorm, alone or added to a residual: one pass over a row, and its input is all that backward keeps.

Letters: D the size of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma_ft.kernels.backend import Implementation, implementation_of
from gemma_ft.kernels.plain_tensors import PLAIN


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """x / rms(x) * (1 + weight) over the last dimension, plus `residual` where one is given.

    x and residual [..., D], weight [D] -> [..., D] in x.dtype; computed in float32 or wider. Gemma stores weight - 1
    and multiplies before the cast back to x.dtype (Llama casts first).
    Source: arXiv:1910.07467 eq. 4; google/gemma_pytorch gemma/model.py RMSNorm.
    """
    fits = weight.shape == x.shape[-1:] and (residual is None or residual.shape == x.shape)
    chosen = implementation_of("rms_norm", x, residual, fits=fits and type(weight) in PLAIN)
    if chosen.name == "torch":
        return rms_norm_reference(x, weight, eps, residual)
    out: Tensor = _RMSNorm.apply(x, weight, eps, residual, chosen)
    return out


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """The same in plain torch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed = (normed * (1.0 + weight.to(wide.dtype))).to(x.dtype)
    return normed if residual is None else residual + normed


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, chosen: Implementation
    ) -> Tensor:
        x = x.contiguous()
        residual = None if residual is None else residual.contiguous()
        out, rstd = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        chosen.run(x, weight.detach().contiguous(), residual, out, rstd, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.chosen = chosen
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        grad_x, grad_weight = None, None
        given = upstream.contiguous()
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x)
            ctx.chosen.backward(given, x, weight.contiguous(), rstd, grad_x)
        if ctx.needs_input_grad[1]:
            summed = ctx.chosen.weight_gradient or _weight_gradient
            grad_weight = summed(given, x, rstd).to(weight.dtype)
        return grad_x, grad_weight, None, upstream if ctx.needs_input_grad[3] else None, None


def _weight_gradient(upstream: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """The gradient of the weight [D], float32."""
    each = upstream.float() * x.float() * rstd[..., None]
    return each.flatten(0, -2).sum(dim=0)
