"""Moments in 8 bits against bitsandbytes' own optimizers: the same codes, the same scales, the same weights but for the
rounding of a square root; in C++ and by the reference.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn

from gemma_ft.kernels import cpp_backend
from gemma_ft.kernels.optimizer_step import Rates, Rule, new_moments, optimizer_step

BETAS: dict[Rule, tuple[float, float]] = {"adam": (0.9, 0.999), "lion": (0.9, 0.99)}


def theirs(rule: Rule, parameter: nn.Parameter, weight_decay: float) -> Any:
    made = bitsandbytes.optim.AdamW8bit if rule == "adam" else bitsandbytes.optim.Lion8bit
    return made([parameter], lr=1e-3, betas=BETAS[rule], weight_decay=weight_decay)


def gradient(size: int, step: int) -> torch.Tensor:
    """Of numbers that are far apart; a block of zeros in the fourth."""
    draw = torch.Generator().manual_seed(step)
    found = torch.randn(size, generator=draw) * torch.rand(size, generator=draw) ** 4 * 10
    if step == 3:
        found[:512] = 0
    return found


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("size", [4096, 12_877, 65_536], ids=str)
@pytest.mark.parametrize("rule", BETAS)
def test_in_cpp_codes_and_scales_are_those_of_bitsandbytes(
    rule: Rule, size: int, weight_decay: float, threads: int
) -> None:
    if not cpp_backend.operations().functions:
        pytest.skip(cpp_backend.operations().reason)
    before = torch.get_num_threads()
    mine = nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(99)))
    other = nn.Parameter(mine.detach().clone())
    state, optimizer = new_moments(rule, mine), theirs(rule, other, weight_decay)
    for step in range(6):
        grad = other.grad = gradient(size, step)
        optimizer.step()
        torch.set_num_threads(threads)
        optimizer_step(rule, mine.data, grad, state, Rates(1e-3, BETAS[rule], 1e-8, weight_decay))
        torch.set_num_threads(before)
    expected = optimizer.state[other]
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(state[name]), torch.as_tensor(value)), name
    assert (mine - other).abs().max() <= 5e-7 * other.abs().max()


@pytest.mark.parametrize("rule", BETAS)
def test_small_tensors_keep_float32_and_step_as_theirs(rule: Rule) -> None:
    mine = nn.Parameter(torch.randn(4095, generator=torch.Generator().manual_seed(1)))
    other = nn.Parameter(mine.detach().clone())
    state, optimizer = new_moments(rule, mine), theirs(rule, other, 0.1)
    for step in range(4):
        grad = other.grad = gradient(4095, step)
        optimizer.step()
        optimizer_step(rule, mine.data, grad, state, Rates(1e-3, BETAS[rule], 1e-8 if rule == "adam" else 0.0, 0.1))
    expected = optimizer.state[other]
    assert state["state1"].dtype == torch.float32
    assert state.keys() == expected.keys()
    assert all(torch.equal(torch.as_tensor(state[name]), torch.as_tensor(one)) for name, one in expected.items())
    assert torch.equal(mine, other)


@pytest.mark.parametrize("rule", BETAS)
def test_the_reference_is_bitsandbytes_to_the_bit(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no compiler."""
    monkeypatch.setattr(cpp_backend, "serves", lambda *_: False)
    mine = nn.Parameter(torch.randn(5000, generator=torch.Generator().manual_seed(1)))
    other = nn.Parameter(mine.detach().clone())
    state, optimizer = new_moments(rule, mine), theirs(rule, other, 0.0)
    for step in range(3):
        grad = other.grad = gradient(5000, step)
        optimizer.step()
        optimizer_step(rule, mine.data, grad, state, Rates(1e-3, BETAS[rule], 1e-8 if rule == "adam" else 0.0, 0.0))
    assert torch.equal(mine, other)
    assert torch.equal(state["state1"], optimizer.state[other]["state1"])
