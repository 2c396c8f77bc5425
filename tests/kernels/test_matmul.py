"""Products in bf16 that are computed in float32: those of torch but for the order of a sum, in parts or whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gemma_ft.kernels import matmul

OUT, IN = 56, 40


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that multiplies float32 faster, whatever this one does."""
    monkeypatch.setattr(matmul, "widens", lambda: True)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def distance(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("weight_numbers", [matmul.WEIGHT_NUMBERS, 10 * IN, IN])
@pytest.mark.parametrize("rows_numbers", [matmul.ROWS_NUMBERS, 70 * OUT])
@pytest.mark.parametrize("rows", [matmul.MANY - 1, matmul.MANY, matmul.MANY + 71])
def test_it_is_the_product(rows: int, rows_numbers: int, weight_numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "WEIGHT_NUMBERS", weight_numbers)
    monkeypatch.setattr(matmul, "ROWS_NUMBERS", rows_numbers)
    weight, x, up = drawn(OUT, IN), drawn(rows, IN, seed=1), drawn(rows, OUT, seed=2)
    cases = (
        (matmul.times_transposed(x, weight), x.double() @ weight.double().T),
        (matmul.times(up, weight), up.double() @ weight.double()),
    )
    for found, truth in cases:
        assert found.dtype == torch.bfloat16
        assert distance(found, truth) < 1.05 * distance(truth.bfloat16(), truth)  # rounded once


def test_autocast_changes_nothing() -> None:
    weight, x = drawn(OUT, IN), drawn(200, IN, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = matmul.times_transposed(x, weight)
    assert torch.equal(found, matmul.times_transposed(x, weight))
    assert distance(found, truth := x.double() @ weight.double().T) < 1.05 * distance(truth.bfloat16(), truth)


def test_a_result_is_not_written_over_by_the_next() -> None:
    weight, x = drawn(OUT, IN), drawn(200, IN, seed=1)
    first = matmul.times_transposed(x, weight)
    kept = first.clone()
    matmul.times_transposed(-x, weight)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_other_dtypes_are_left_to_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "widened", None)
    monkeypatch.setattr(matmul, "widened_transposed", None)
    weight, x = drawn(OUT, IN, dtype=dtype), drawn(200, IN, dtype=dtype)
    assert torch.equal(matmul.times_transposed(x, weight), x @ weight.T)
    assert matmul.product_dtype(x) == dtype


def test_rows_that_are_not_side_by_side() -> None:
    weight, x = drawn(OUT, IN), drawn(200, IN + OUT, seed=1)
    assert torch.equal(matmul.times_transposed(x[:, :IN], weight), matmul.times_transposed(x[:, :IN].clone(), weight))
    assert torch.equal(matmul.times(x[:, IN:], weight), matmul.times(x[:, IN:].clone(), weight))


def test_no_rows() -> None:
    assert matmul.times_transposed(drawn(0, IN), drawn(OUT, IN)).shape == (0, OUT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", [(8, OUT), (OUT, 8)])
def test_the_product_of_a_gradient_is_laid_out_as_the_weight(widths: tuple[int, int], dtype: torch.dtype) -> None:
    """Else autograd copies it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = (drawn(200, width, seed=width).to(device) for width in widths)
    found = matmul.transposed_times(x, y, dtype)
    truth = x.cpu().double().T @ y.cpu().double()
    assert (found.shape, found.dtype, found.is_contiguous()) == (widths, dtype, True)
    assert distance(found.cpu(), truth) < 1.05 * distance(truth.bfloat16(), truth)
