"""GeGLU's middle, gelu(gate) * up: one pass, and gate and up are all that backward keeps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma_ft.kernels.backend import Implementation, implementation_of


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up, each of any one shape and dtype. Source: arXiv:2002.05202."""
    chosen = implementation_of("geglu", gate, up)
    if chosen.name == "torch" or gate.shape != up.shape:
        return geglu_reference(gate, up)
    out: Tensor = _GeGLU.apply(gate, up, chosen)
    return out


def geglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The same in plain torch."""
    return F.gelu(gate, approximate="tanh") * up


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, chosen: Implementation) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        chosen.run(gate, up, out)
        ctx.save_for_backward(gate, up)
        ctx.chosen = chosen
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        ctx.chosen.backward(upstream.contiguous(), gate, up, grad_gate, grad_up)
        return grad_gate, grad_up, None
