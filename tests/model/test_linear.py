"""The product with the weight first is the linear layer's, whatever the rows are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gemma_ft.kernels.gemv import MOST_ROWS
from gemma_ft.model.linear import linear

DTYPES = [(torch.bfloat16, 8e-3), (torch.float32, 1e-5), (torch.float64, 1e-12)]


def layer(dtype: torch.dtype, *, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 70, bias=bias, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("shape", [(1, 48), (1, 1, 48), (2, 3, 48), (MOST_ROWS, 48), (MOST_ROWS + 1, 48), (0, 48)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_it_is_the_linear_layer(shape: tuple[int, ...], bias: bool, dtype: torch.dtype, tolerance: float) -> None:
    one = layer(dtype, bias=bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = linear(one, x)
    assert found.shape == (*shape[:-1], 70)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), one.double()(x.double()), rtol=tolerance, atol=tolerance)


def test_gradients_take_the_ordinary_path() -> None:
    one, x = layer(torch.bfloat16), torch.randn(2, 48).bfloat16().requires_grad_()
    linear(one, x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, one.weight.sum(dim=0).expand(2, -1), rtol=1e-2, atol=1e-2)


def test_hooks_are_called() -> None:
    one, seen = layer(torch.bfloat16), []
    one.register_forward_pre_hook(lambda *_: seen.append(1))
    linear(one, torch.ones(1, 48).bfloat16())
    assert seen == [1]
    forward = one.forward
    one.forward = lambda x: forward(x) * 2
    assert torch.equal(linear(one, torch.ones(1, 48).bfloat16()), forward(torch.ones(1, 48).bfloat16()) * 2)
