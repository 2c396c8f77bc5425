"""RMSNorm with its residual, in Triton: a program for each row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def warps(block: int) -> int:
    """For a row of so many numbers: sixteen to a thread, which keeps it in registers, and loads in flight."""
    return min(max(block // 512, 4), 16)


@triton.jit
def _forward(x, weight, residual, out, rstd, size, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < size
    row = tl.program_id(0).to(tl.int64) * size + at
    given = tl.load(x + row, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(given * given, axis=0) / size + eps)
    tl.store(rstd + tl.program_id(0), scale)
    gain = 1.0 + tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    found = (given * scale * gain).to(out.dtype.element_ty)
    if ADDS:  # the sum is of the rounded norm
        before = tl.load(residual + row, mask=inside, other=0.0).to(tl.float32)
        found = (before + found.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + row, found, mask=inside)


@triton.jit
def _backward(upstream, x, weight, rstd, grad, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < size
    row = tl.program_id(0).to(tl.int64) * size + at
    given = tl.load(x + row, mask=inside, other=0.0).to(tl.float32)
    gain = 1.0 + tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    pull = tl.load(upstream + row, mask=inside, other=0.0).to(tl.float32) * gain
    scale = tl.load(rstd + tl.program_id(0))
    back = tl.sum(pull * given, axis=0) * scale * scale * scale / size
    tl.store(grad + row, (pull * scale - given * back).to(grad.dtype.element_ty), mask=inside)


def forward(x: Tensor, weight: Tensor, residual: Tensor | None, out: Tensor, rstd: Tensor, eps: float) -> None:
    """x [.., D], contiguous as all -> out and 1 / rms [..] in float32."""
    size = x.shape[-1]
    block = triton.next_power_of_2(size)
    with torch.cuda.device_of(x):
        _forward[(rstd.numel(),)](
            x, weight, x if residual is None else residual, out, rstd, size, eps, residual is not None, block,
            num_warps=warps(block),
        )  # fmt: skip


def backward(upstream: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, grad: Tensor) -> None:
    """The gradient of x in `grad`."""
    size = x.shape[-1]
    block = triton.next_power_of_2(size)
    with torch.cuda.device_of(x):
        _backward[(rstd.numel(),)](upstream, x, weight, rstd, grad, size, block, num_warps=warps(block))
