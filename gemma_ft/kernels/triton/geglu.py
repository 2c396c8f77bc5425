"""GeGLU's middle in Triton: one pass over gate and up, forwards and backwards."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma_ft.kernels.triton.activations import gelu_tanh_and_slope

BLOCK = 1024


@triton.jit
def _forward(gate, up, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    t, _ = gelu_tanh_and_slope(g)
    rounded = (0.5 * g * (1.0 + t)).to(out.dtype.element_ty).to(tl.float32)
    given = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (rounded * given).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(upstream, gate, up, grad_gate, grad_up, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    given = tl.load(upstream + at, mask=inside, other=0.0).to(tl.float32)
    t, rise = gelu_tanh_and_slope(g)
    slope = 0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * rise
    other = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_gate + at, (given * other * slope).to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + at, (given * 0.5 * g * (1.0 + t)).to(grad_up.dtype.element_ty), mask=inside)


def forward(gate: Tensor, up: Tensor, out: Tensor) -> None:
    """gelu_tanh(gate) * up in `out`; all contiguous."""
    with torch.cuda.device_of(gate):
        _forward[(triton.cdiv(out.numel(), BLOCK),)](gate, up, out, out.numel(), BLOCK)


def backward(upstream: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor) -> None:
    """Both gradients."""
    grid = (triton.cdiv(gate.numel(), BLOCK),)
    with torch.cuda.device_of(gate):
        _backward[grid](upstream, gate, up, grad_gate, grad_up, gate.numel(), BLOCK)
