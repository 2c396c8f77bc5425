"""NF4 weights in Triton: all numbers of a weight in one pass, its scales' own scales included, where bitsandbytes takes
three launches and writes the scales in between.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma_ft.kernels.triton import triton_backend as gpu

BYTES = 1024  # of a program: two weights each


@triton.jit
def _dequantize(
    packed, absmax, code, code2, absmax2, offset, out, count,
    NESTED: tl.constexpr, BLOCK: tl.constexpr, BLOCK2: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BYTES
    at = first + tl.arange(0, BYTES)
    both = tl.load(packed + at, mask=at < count, other=0)
    block = at * 2 // BLOCK
    scale = tl.load(absmax + block, mask=at < count, other=0)
    if NESTED:  # in the two steps that bitsandbytes rounds
        of_many = tl.load(absmax2 + block // BLOCK2, mask=at < count, other=0.0)
        scale = tl.load(code2 + scale.to(tl.int32)) * of_many + tl.load(offset)
    high = tl.load(code + (both >> 4).to(tl.int32)) * scale
    low = tl.load(code + (both & 15).to(tl.int32)) * scale
    to = 2 * first + tl.arange(0, 2 * BYTES)
    tl.store(out + to, tl.interleave(high, low).to(out.dtype.element_ty), mask=to < 2 * count)


def dequantize(packed: Tensor, state: Any, out: Tensor | None = None) -> Tensor:
    """Packed bytes and bitsandbytes' QuantState -> the weight [O, I] in state.dtype, bit for bit as bitsandbytes has
    it. Only where it `takes` them. Source: bitsandbytes functional.py dequantize_4bit.
    """
    weight = torch.empty(state.shape, dtype=state.dtype, device=packed.device) if out is None else out
    count = weight.numel() // 2
    with torch.cuda.device_of(weight):
        _dequantize[(triton.cdiv(count, BYTES),)](
            bytes_of(packed), *scales_of(state), weight, count, *blocks_of(state), BYTES,
            enable_fp_fusion=False,  # a scale is rounded before the offset is added to it
        )  # fmt: skip
    return weight


def takes(packed: Tensor, state: Any) -> bool:
    """Whether these kernels read this weight, which is in its usual form and whose numbers they serve."""
    nested = not state.nested or (isinstance(state.offset, Tensor) and gpu.serves(state.code, state.offset))
    return nested and gpu.reason_against(packed.device, state.dtype) is None


def bytes_of(packed: Tensor) -> Tensor:
    """What is stored, whatever dtype it is stored as."""
    return packed.data.view(torch.uint8)


def scales_of(state: Any) -> tuple[Tensor, ...]:
    """absmax, code, code2, absmax2, offset, as the kernels take them; some of them twice where there is one level."""
    if state.nested:
        return state.absmax, state.code, state.state2.code, state.state2.absmax, state.offset
    return state.absmax, state.code, state.absmax, state.absmax, state.absmax


def blocks_of(state: Any) -> tuple[bool, int, int]:
    """Whether there are two levels of scales, and the sizes of their blocks."""
    return state.nested, state.blocksize, state.state2.blocksize if state.nested else 1
