"""Products of many rows with a weight, in bf16 on a CPU, computed in the dtype that its processor multiplies fastest.

A processor of Intel's without tiles for bf16 (AMX) multiplies pairs of bf16 at half the rate of float32
(benchmarks/results/products.json). Either way the sums are float32 and rounded once: what comes out differs in their
order alone.

Letters: M rows, I input and O output features.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from gemma_ft.kernels.plain_tensors import are_plain
from gemma_ft.kernels.triton import triton_backend as gpu
from gemma_ft.kernels.workspace import workspace
from gemma_ft.system import environment
from gemma_ft.system.hardware import cpu_flags, float32_is_faster
from gemma_ft.system.limits import ROWS_NUMBERS, WEIGHT_NUMBERS

MANY = 128  # rows from which on widening the weight pays


def times_transposed(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, I], weight [O, I] -> x weightᵀ [M, O] in their dtype, without a gradient."""
    return widened_transposed(x, weight) if serves(x, weight) else x @ weight.T


def times(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, O], weight [O, I] -> x weight [M, I] in their dtype, without a gradient."""
    return widened(x, weight) if serves(x, weight) else x @ weight


def transposed_times(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """x [M, A], y [M, B] -> xᵀ y [A, B] in `dtype`, contiguous, without a gradient: what the gradient of a weight is.

    On a GPU products of bf16 are written in float32 at once, where that is asked for; elsewhere they are rounded first.
    """
    if x.is_cuda and x.dtype == torch.bfloat16 and dtype == torch.float32 and _writes_float32(x.device):
        return torch.mm(x.T, y, out_dtype=dtype)
    if x.shape[1] <= y.shape[1]:
        return (x.T @ y).to(dtype)
    # a CPU multiplies faster with the shorter side first
    return torch.empty(x.shape[1], y.shape[1], dtype=dtype, device=x.device).copy_((y.T @ x).T)


@cache
def _writes_float32(device: torch.device) -> bool:
    def one() -> None:
        numbers = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
        torch.mm(numbers.T, numbers, out_dtype=torch.float32)

    return gpu.tried(one) is None


def widened_transposed(x: Tensor, weight: Tensor) -> Tensor:
    """`times_transposed`, computed in float32."""
    out = torch.empty(len(x), len(weight), dtype=x.dtype)
    for part, wide in _parts(weight):
        for rows in _pieces(len(x), ROWS_NUMBERS // max(wide.shape)):
            out[rows, part] = torch.mm(_wide_rows(x[rows]), wide.T, out=_result(out[rows, part]))
    return out


def widened(x: Tensor, weight: Tensor) -> Tensor:
    """`times`, computed in float32: the sum over parts of the weight stays wide."""
    out = torch.empty(len(x), weight.shape[1], dtype=x.dtype)
    if weight.numel() <= WEIGHT_NUMBERS:
        _, wide = next(_parts(weight))
        for rows in _pieces(len(x), ROWS_NUMBERS // max(wide.shape)):
            out[rows] = torch.mm(_wide_rows(x[rows]), wide, out=_result(out[rows]))
        return out
    longest = max(weight.shape[1], WEIGHT_NUMBERS // weight.shape[1])
    for rows in _pieces(len(x), ROWS_NUMBERS // longest):
        found = _result(out[rows]).zero_()
        for part, wide in _parts(weight):
            found.addmm_(_wide_rows(x[rows, part]), wide)
        out[rows] = found
    return out


def widened_gradient(x: Tensor, y: Tensor) -> Tensor:
    """x [M, A], y [M, B] -> xᵀ y [A, B] in float32: the sum over parts of the rows stays wide."""
    found = torch.zeros(x.shape[1], y.shape[1])
    for rows in _pieces(len(x), ROWS_NUMBERS // max(x.shape[1], y.shape[1])):
        wide = workspace().take("wide result", y[rows].shape, torch.float32).copy_(y[rows])
        found.addmm_(_wide_rows(x[rows]).T, wide)
    return found


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether a product with rows x is computed in float32 though its numbers are not: many rows in bf16 on a CPU."""
    return len(x) >= MANY and are_plain(x, weight) and product_dtype(x) != x.dtype


def verdict(device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> tuple[bool, str]:
    """Whether products of many rows are computed in float32 on the CPU, and why, in words for the user."""
    if dtype != torch.bfloat16 or not widens():
        return False, ""
    return True, "bf16 is multiplied in float32, which this processor does faster"


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which this machine multiplies a tensor on the CPU fastest: its own, or float32 for bf16."""
    return torch.float32 if x.dtype == torch.bfloat16 and widens() else x.dtype


@cache
def widens() -> bool:
    """Whether products in bf16 are computed in float32 on this machine, whatever they are."""
    return environment.own_kernels_wanted() and float32_is_faster(cpu_flags())


def _parts(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Parts of a weight's rows, and each in float32, which the next one writes over."""
    for part in _pieces(len(weight), WEIGHT_NUMBERS // weight.shape[1]):
        rows = weight[part]
        yield part, workspace().take("wide weight", rows.shape, torch.float32).copy_(rows)


def _wide_rows(rows: Tensor) -> Tensor:
    return workspace().take("wide rows", rows.shape, torch.float32).copy_(rows)


def _result(like: Tensor) -> Tensor:
    return workspace().take("wide result", like.shape, torch.float32)


def _pieces(count: int, size: int) -> Iterator[slice]:
    """As few slices as have at most `size` of `count`, alike in size."""
    pieces = -(-count // max(size, 1))
    for piece in range(pieces):
        yield slice(count * piece // pieces, count * (piece + 1) // pieces)
