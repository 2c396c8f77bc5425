"""What LoRA adds to the product of few rows, in Triton: the adapter is read as it is stored, and cast within.

Letters: M rows, I input and O output features, R rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

STEP, BLOCK = 1024, 64  # inputs, and outputs, that a program takes at a time


@triton.jit
def _low(x, a, low, inputs, rank, scaling, STEP: tl.constexpr):
    r, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    total = tl.zeros((STEP,), tl.float32)
    for start in tl.range(0, inputs, STEP):
        at = start + tl.arange(0, STEP)
        given = tl.load(x + row * inputs + at, mask=at < inputs, other=0.0).to(tl.float32)
        weight = tl.load(a + r * inputs + at, mask=at < inputs, other=0.0).to(x.dtype.element_ty)
        total += given * weight.to(tl.float32)
    tl.store(low + row * rank + r, (tl.sum(total, axis=0) * scaling).to(low.dtype.element_ty))


@triton.jit
def _add(low, b, out, outputs, rank, RANK: tl.constexpr, BLOCK: tl.constexpr):
    o, row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    r = tl.arange(0, RANK)
    below = tl.load(low + row * rank + r, mask=r < rank, other=0.0).to(tl.float32)
    inside = (o[:, None] < outputs) & (r[None, :] < rank)
    weight = tl.load(b + o.to(tl.int64)[:, None] * rank + r[None, :], mask=inside, other=0.0).to(low.dtype.element_ty)
    added = tl.sum(weight.to(tl.float32) * below[None, :], axis=1)
    to = out + row * outputs + o
    before = tl.load(to, mask=o < outputs, other=0.0).to(tl.float32)
    tl.store(to, (before + added).to(out.dtype.element_ty), mask=o < outputs)


def add_lora(x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, out: Tensor) -> None:
    """Adds scaling · x lora_aᵀ lora_bᵀ to `out` [M, O], rounded to its dtype where plain LoRA rounds: behind each of
    the two products. x [M, I], lora_a [R, I], lora_b [O, R], all contiguous; a row's result does not depend on others.
    """
    (rows, inputs), (outputs, rank) = x.shape, lora_b.shape
    low = x.new_empty((rows, rank))
    with torch.cuda.device_of(x):
        _low[(rank, rows)](x, lora_a, low, inputs, rank, scaling, STEP)
        _add[(triton.cdiv(outputs, BLOCK), rows)](
            low, lora_b, out, outputs, rank, triton.next_power_of_2(rank), BLOCK
        )  # fmt: skip
