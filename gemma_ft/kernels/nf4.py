"""NF4 weights as bitsandbytes stores them -> numbers, bit for bit as bitsandbytes makes them; and products of few rows,
within which a weight is unpacked.

On a CPU bitsandbytes takes many times as long for it as reading the result takes (benchmarks/results/products.json);
the operation in C++ looks each number up in its block's sixteen. On a GPU it takes three launches, the kernel in Triton
one (benchmarks/results/launches.json).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma_ft.kernels import cpp_backend, gemv
from gemma_ft.kernels.triton import triton_backend as gpu


def dequantize_nf4(packed: Tensor, state: Any, out: Tensor | None = None) -> Tensor:
    """Packed bytes and bitsandbytes' QuantState -> the weight [out features, in features] in state.dtype.

    `out`: where to put it, contiguous and of that dtype and shape. Source: arXiv:2305.14314; bitsandbytes functional.py
    dequantize_4bit.
    """
    if serves_nf4_on_gpu(packed, state):
        from gemma_ft.kernels.triton import nf4 as kernel

        return kernel.dequantize(packed, state, out)
    if not serves_nf4(packed, state):
        from bitsandbytes.functional import dequantize_4bit

        found: Tensor = dequantize_4bit(packed, state, out=out)
        return found
    weight = torch.empty(state.shape, dtype=state.dtype) if out is None else out
    scales, blocks = scales_of(state)
    cpp_backend.call("nf4", packed, *scales, weight, weight.numel(), *blocks, of=state.dtype)
    return weight


def few_rows_nf4(x: Tensor, packed: Tensor, state: Any) -> Tensor:
    """x [M, I] times the weight transposed -> [M, O], for as few rows as decoding has: the weight is unpacked within
    the product. Only where `serves_few_rows_nf4`.
    """
    x = x.contiguous()
    if x.is_cuda:
        from gemma_ft.kernels.triton import gemv_nf4 as kernel

        return kernel.few_rows_nf4(x, packed, state)
    out = torch.empty(len(x), state.shape[0], dtype=x.dtype)
    scales, blocks = scales_of(state)
    cpp_backend.call("few_rows_nf4", packed, *scales, x, out, len(x), *state.shape, *blocks, of=x.dtype)
    return out


def serves_few_rows_nf4(x: Tensor, packed: Tensor, state: Any) -> bool:
    """Whether `few_rows_nf4` takes these rows [M, I] and this weight."""
    if x.dtype != state.dtype or x.device != packed.device or len(x) > gemv.MOST_ROWS:
        return False
    if not x.is_cuda:
        few = gemv.are_few(x, len(x)) and serves_nf4(packed, state)
        return few and gemv.fits(len(x), state.shape, state.blocksize)
    if not serves_nf4_on_gpu(packed, state):
        return False
    from gemma_ft.kernels.triton import gemv_nf4 as kernel

    return kernel.fits(x, state)


def scales_of(state: Any) -> tuple[tuple[Any, ...], tuple[int, int]]:
    """How cpp/ops.cpp takes the scales and the sixteen numbers, and the sizes of the blocks."""
    if not state.nested:
        return (state.absmax, None, None, None, 0.0, state.code), (state.blocksize, 1)
    nested = state.state2
    scales = (None, state.absmax, nested.code, nested.absmax, float(state.offset), state.code)
    return scales, (state.blocksize, nested.blocksize)


def serves_nf4(packed: Tensor, state: Any) -> bool:
    """Whether the C++ operation reads this weight: on the CPU, in its usual form, in whole blocks."""
    return (
        packed.device.type == "cpu"
        and _is_usual(packed, state)
        and state.blocksize % 32 == 0
        and cpp_backend.serves(*_numbers(state))
    )


def serves_nf4_on_gpu(packed: Tensor, state: Any) -> bool:
    """Whether the Triton kernels read this weight: where they run, in its usual form, in whole blocks."""
    return (
        packed.is_cuda
        and _is_usual(packed, state)
        and (not state.nested or isinstance(state.offset, Tensor))
        and gpu.serves(*_numbers(state), state.offset if state.nested else None)
        and gpu.reason_against(packed.device, state.dtype) is None
    )


def _is_usual(packed: Tensor, state: Any) -> bool:
    return (
        type(packed.data) is Tensor
        and packed.is_contiguous()
        and (not state.nested or state.absmax.dtype == torch.uint8)
        and state.absmax.device == packed.device
        and state.quant_type == "nf4"
        and state.dtype in cpp_backend.SUFFIXES
        and not getattr(state, "packing_format_for_cpu", False)
        and len(state.shape) == 2
        and state.shape[1] % state.blocksize == 0  # else bitsandbytes starts a block anew in each row
        and all(one.dtype == torch.float32 for one in _numbers(state))
    )


def _numbers(state: Any) -> list[Tensor]:
    """What of a state is float32."""
    return [state.code, state.state2.code, state.state2.absmax] if state.nested else [state.code, state.absmax]
