"""The product with a frozen weight in bf16, float32 or NF4: dequantized once for a pass, or read as it
is stored for few rows.

Letters: M rows, I input and O output features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma_ft.kernels import few_rows
from gemma_ft.kernels.nf4 import dequantize_nf4, few_rows_nf4, serves_nf4


def frozen_product(rows: Tensor, weight: Tensor, state: Any | None) -> Tensor:
    """rows [M, I] times the weight transposed -> [M, O], without a gradient. `weight` [O, I], or NF4 bytes with
    bitsandbytes' QuantState.
    """
    shape = weight.shape if state is None else state.shape
    if rows.device.type == "cpu" and rows.dtype == torch.bfloat16 and few_rows.fits(len(rows), shape):
        if state is None and weight.dtype == rows.dtype:
            return few_rows.few_rows(rows, weight)
        if state is not None and state.dtype == rows.dtype and serves_nf4(weight, state):
            return few_rows_nf4(rows.contiguous(), weight, state)
    return rows @ plain(weight, state, rows.dtype).T


def plain(weight: Tensor, state: Any | None, dtype: torch.dtype) -> Tensor:
    """The weight [O, I] in `dtype`; one in 4 bits is dequantized for this use, and gone after it."""
    return (weight if state is None else dequantize_nf4(weight, state)).to(dtype)
