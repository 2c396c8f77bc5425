"""GeGLU's middle, gelu(gate) * up: one pass, and gate and up are all that backward keeps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma_ft.kernels import cpp_backend
from gemma_ft.kernels.triton import triton_backend as gpu


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up, each of any one shape and dtype. Source: arXiv:2002.05202."""
    on_gpu = gpu.serves(gate, up)
    if (on_gpu or cpp_backend.serves(gate, up)) and gate.shape == up.shape:
        out: Tensor = _GeGLU.apply(gate, up, on_gpu)
        return out
    return geglu_reference(gate, up)


def geglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The same in plain torch."""
    return F.gelu(gate, approximate="tanh") * up


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, on_gpu: bool) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        if on_gpu:
            from gemma_ft.kernels.triton import geglu as kernel

            kernel.forward(gate, up, out)
        else:
            cpp_backend.call("geglu", gate, up, out, out.numel(), of=gate.dtype)
        ctx.save_for_backward(gate, up)
        ctx.on_gpu = on_gpu
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        given = upstream.contiguous()
        if ctx.on_gpu:
            from gemma_ft.kernels.triton import geglu as kernel

            kernel.backward(given, gate, up, grad_gate, grad_up)
        else:
            cpp_backend.call("geglu_backward", given, gate, up, grad_gate, grad_up, gate.numel(), of=gate.dtype)
        return grad_gate, grad_up, None
