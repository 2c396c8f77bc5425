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

from gemma_ft.kernels.backend import Implementation, implementation_of
from gemma_ft.kernels.gemv import MOST_ROWS
from gemma_ft.kernels.matmul import times_transposed
from gemma_ft.kernels.plain_tensors import DTYPES
from gemma_ft.kernels.workspace import workspace


def nf4_implementation(packed: Tensor, state: Any) -> Implementation:
    """What reads this weight: bitsandbytes' own, the reference, unless it is in its usual form, in whole blocks."""
    return _chosen("nf4", packed, state, (packed, state))


def dequantize_nf4(packed: Tensor, state: Any, out: Tensor | None = None) -> Tensor:
    """Packed bytes and bitsandbytes' QuantState -> the weight [out features, in features] in state.dtype.

    `out`: where to put it, contiguous and of that dtype and shape. Source: arXiv:2305.14314; bitsandbytes functional.py
    dequantize_4bit.
    """
    weight: Tensor = nf4_implementation(packed, state).run(packed, state, out)
    return weight


def dequantize_nf4_reference(packed: Tensor, state: Any, out: Tensor | None = None) -> Tensor:
    """The same by bitsandbytes, whatever the weight's form."""
    from bitsandbytes.functional import dequantize_4bit

    found: Tensor = dequantize_4bit(packed, state, out=out)
    return found


def dequantize_nf4_for_now(packed: Tensor, state: Any) -> Tensor:
    """`dequantize_nf4` for one use: where C++ does it, into memory that the next use writes over."""
    chosen = nf4_implementation(packed, state)
    out = workspace().take("nf4 weight", state.shape, state.dtype) if chosen.name == "cpp" else None
    weight: Tensor = chosen.run(packed, state, out)
    return weight


def nf4_product(x: Tensor, packed: Tensor, state: Any) -> Tensor:
    """x [M, I] times the weight transposed -> [M, O] in x.dtype, without a gradient. For as few rows as decoding has
    the weight is unpacked within the product.
    """
    few = 0 < len(x) <= MOST_ROWS and x.dtype == state.dtype and x.device == packed.device
    found: Tensor = _chosen("nf4_gemv", packed, state, (x, packed, state), fits=few).run(x, packed, state)
    return found


def dequantized_product(x: Tensor, packed: Tensor, state: Any) -> Tensor:
    """The same of a weight that is dequantized before."""
    return times_transposed(x, dequantize_nf4_for_now(packed, state).to(x.dtype))


def _chosen(operation: str, packed: Tensor, state: Any, given: tuple[Any, ...], *, fits: bool = True) -> Implementation:
    fits = fits and _is_usual(packed, state)
    return implementation_of(operation, *(_numbers(state) if fits else ()), fits=fits, given=given)


def _is_usual(packed: Tensor, state: Any) -> bool:
    """Whether a weight is stored in the form that the kernels read."""
    return (
        type(packed.data) is Tensor
        and packed.is_contiguous()
        and (not state.nested or state.absmax.dtype == torch.uint8)
        and state.absmax.device == packed.device
        and state.quant_type == "nf4"
        and state.dtype in DTYPES
        and not getattr(state, "packing_format_for_cpu", False)
        and len(state.shape) == 2
        and state.shape[1] % state.blocksize == 0  # else bitsandbytes starts a block anew in each row
        and all(one.dtype == torch.float32 and one.device == packed.device for one in _numbers(state))
    )


def _numbers(state: Any) -> list[Tensor]:
    """What of a state is float32."""
    return [state.code, state.state2.code, state.state2.absmax] if state.nested else [state.code, state.absmax]
