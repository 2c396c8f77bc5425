"""NF4 weights as bitsandbytes stores them -> numbers, bit for bit as bitsandbytes makes them.

On a CPU it takes many times as long for it as reading the result takes (benchmarks/results/products.json); the
operation in C++ looks each number up in its block's sixteen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma_ft.kernels import native


def dequantize_nf4(packed: Tensor, state: Any, out: Tensor | None = None) -> Tensor:
    """Packed bytes and bitsandbytes' QuantState -> the weight [out features, in features] in state.dtype.

    `out`: where to put it, contiguous and of that dtype and shape. Source: arXiv:2305.14314; bitsandbytes functional.py
    dequantize_4bit.
    """
    if not serves_nf4(packed, state):
        from bitsandbytes.functional import dequantize_4bit

        found: Tensor = dequantize_4bit(packed, state, out=out)
        return found
    weight = torch.empty(state.shape, dtype=state.dtype) if out is None else out
    scales, blocks = scales_of(state)
    native.call("nf4", packed, *scales, weight, weight.numel(), *blocks, of=state.dtype)
    return weight


def few_rows_nf4(x: Tensor, packed: Tensor, state: Any) -> Tensor:
    """x [M, I] times the weight transposed -> [M, O], for as few rows as decoding has: the weight is unpacked within
    the product. Only where `serves_nf4`, x is of state.dtype, and `few_rows.fits`.
    """
    out = torch.empty(len(x), state.shape[0], dtype=x.dtype)
    scales, blocks = scales_of(state)
    native.call("few_rows_nf4", packed, *scales, x, out, len(x), *state.shape, *blocks, of=x.dtype)
    return out


def scales_of(state: Any) -> tuple[tuple[Any, ...], tuple[int, int]]:
    """How cpp/ops.cpp takes the scales and the sixteen numbers, and the sizes of the blocks."""
    if not state.nested:
        return (state.absmax, None, None, None, 0.0, state.code), (state.blocksize, 1)
    nested = state.state2
    scales = (None, state.absmax, nested.code, nested.absmax, float(state.offset), state.code)
    return scales, (state.blocksize, nested.blocksize)


def serves_nf4(packed: Tensor, state: Any) -> bool:
    """Whether the C++ operation reads this weight: on the CPU, in its usual form, in whole blocks."""
    numbers = [state.code, state.absmax] if not state.nested else [state.code, state.state2.code, state.state2.absmax]
    return (
        type(packed.data) is Tensor
        and packed.device.type == "cpu"
        and packed.is_contiguous()
        and (not state.nested or state.absmax.dtype == torch.uint8)
        and state.quant_type == "nf4"
        and state.dtype in native.SUFFIXES
        and not getattr(state, "packing_format_for_cpu", False)
        and len(state.shape) == 2
        and state.shape[1] % state.blocksize == 0  # else bitsandbytes starts a block anew in each row
        and state.blocksize % 32 == 0
        and all(one.dtype == torch.float32 for one in numbers)
        and native.serves(*numbers)
    )
