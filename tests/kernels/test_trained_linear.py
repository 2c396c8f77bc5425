"""A weight that is trained in float32 under bf16 autocast: as near to the truth as autocast, and no copy of it kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gemma_ft.kernels import matmul
from gemma_ft.kernels.trained_linear import takes_trained
from gemma_ft.model.linear import linear
from tests.kernels.test_operations import drawn, error

ROWS, INTO, OUT = (3, 50), 72, 40


def layer_and_rows() -> tuple[nn.Linear, Tensor]:
    layer = nn.Linear(INTO, OUT, bias=False)
    with torch.no_grad():
        layer.weight.copy_(drawn(OUT, INTO, seed=1))
    return layer, drawn(*ROWS, INTO).bfloat16().requires_grad_()


def results(layer: nn.Linear, rows: Tensor, out: Tensor) -> list[Tensor]:
    upstream = drawn(*ROWS, OUT, seed=2).bfloat16()
    return [out.detach(), *torch.autograd.grad(out, [rows, layer.weight], upstream)]


def truth() -> list[Tensor]:
    """Of the rounded weight, in float64."""
    layer, rows = layer_and_rows()
    weight = layer.weight.detach().bfloat16().double().requires_grad_()
    wide = rows.detach().double().requires_grad_()
    out = wide @ weight.T
    return [out.detach(), *torch.autograd.grad(out, [wide, weight], drawn(*ROWS, OUT, seed=2).bfloat16().double())]


@pytest.mark.parametrize("widened", [False, True])
def test_it_is_as_near_to_the_truth_as_autocast(widened: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "widens", lambda: widened)
    layer, rows = layer_and_rows()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert takes_trained(rows, layer.weight)
        mine, plain = results(layer, rows, linear(layer, rows)), results(layer, rows, layer(rows))
    assert [one.dtype for one in mine] == [one.dtype for one in plain]
    for found, other, exact in zip(mine, plain, truth(), strict=True):
        assert error(found.double(), exact) <= 1.05 * error(other.double(), exact)
    if widened:  # never rounded
        assert error(mine[2].double(), truth()[2]) < 1e-6


def test_in_pieces_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and rows that are widened in parts."""
    monkeypatch.setattr(matmul, "widens", lambda: True)
    monkeypatch.setattr(matmul, "WEIGHT_NUMBERS", 700)
    monkeypatch.setattr(matmul, "ROWS_NUMBERS", 3000)
    layer, rows = layer_and_rows()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for found, exact in zip(results(layer, rows, linear(layer, rows)), truth(), strict=True):
            assert error(found.double(), exact) < 4e-3


def test_nothing_but_rows_and_the_weight_itself_is_kept() -> None:
    layer, rows = layer_and_rows()
    kept: list[int] = []
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda one: (kept.append(one.data_ptr()), one)[1], lambda one: one),
    ):
        linear(layer, rows)
    assert kept == [rows.data_ptr(), layer.weight.data_ptr()]


def test_what_autocast_does_not_narrow_is_left_to_the_layer() -> None:
    layer, rows = layer_and_rows()
    assert not takes_trained(rows, layer.weight)  # no autocast
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not takes_trained(rows.float(), layer.weight)
        assert not takes_trained(rows[:1], layer.weight)  # few
        assert not takes_trained(rows, layer.weight.bfloat16())


def test_without_a_gradient_it_is_the_same_to_the_bit() -> None:
    layer, rows = layer_and_rows()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one = linear(layer, rows)
        with torch.no_grad():
            assert torch.equal(linear(layer, rows), one)
