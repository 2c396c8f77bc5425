"""Steps of AdamW and Lion whose moments lie in 8 bits, as bitsandbytes stores them: codes of a dynamic map for each
number, and for each block of them the largest, in float32.

On a CPU bitsandbytes dequantizes, steps and quantizes whole tensors, in a pass over memory for each operation; the
operations in C++ do a block at a time and come to the same codes and weights. On a GPU its own kernels run.
Source: arXiv:2110.02861; bitsandbytes optim/optimizer.py, backends/cpu/ops.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor

from gemma_ft.kernels.backend import implementation_of
from gemma_ft.system.limits import MOMENT_BLOCK, SMALLEST_IN_8BIT

Rule = Literal["adam", "lion"]  # bitsandbytes' words
MOMENTS: dict[Rule, int] = {"adam": 2, "lion": 1}
STEPS_OF_MAP = 2**16  # from -1 to 1, in which bitsandbytes looks the nearest code up on a CPU


@dataclass(frozen=True)
class Rates:
    """What a group of parameters is stepped with."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float  # decoupled, of a step: lr times it


def new_moments(rule: Rule, parameter: Tensor) -> dict[str, Any]:
    """The state of a parameter before its first step, under bitsandbytes' names: float32 for small tensors."""
    state: dict[str, Any] = {"step": 0}
    for number in range(1, MOMENTS[rule] + 1):
        if parameter.numel() < SMALLEST_IN_8BIT:
            state[f"state{number}"] = torch.zeros_like(parameter, dtype=torch.float32)
            continue
        blocks = -(-parameter.numel() // MOMENT_BLOCK)
        state[f"state{number}"] = torch.zeros_like(parameter, dtype=torch.uint8)
        state[f"qmap{number}"] = dynamic_map(number == 1).to(parameter.device, copy=True)
        state[f"absmax{number}"] = torch.zeros(blocks, dtype=torch.float32, device=parameter.device)
    return state


def optimizer_step(rule: Rule, parameter: Tensor, grad: Tensor, state: dict[str, Any], rates: Rates) -> None:
    """A step of a contiguous parameter and its state, in place; `state` as `new_moments` makes it."""
    state["step"] += 1
    if state["state1"].dtype == torch.float32:
        _float32_step(rule, parameter, grad, state, rates)
        return
    fits = parameter.is_contiguous() and grad.is_contiguous() and state["state1"].is_contiguous()
    chosen = implementation_of("optimizer_step", parameter.data, grad, fits=fits)
    chosen.run(rule, parameter, grad, state, rates)


def optimizer_step_reference(rule: Rule, parameter: Tensor, grad: Tensor, state: dict[str, Any], rates: Rates) -> None:
    """The same by bitsandbytes, on any device."""
    from bitsandbytes.functional import optimizer_update_8bit_blockwise

    optimizer_update_8bit_blockwise(
        rule, grad, parameter, state["state1"], state.get("state2"), *rates.betas, 0.0, 0.0, rates.eps, state["step"],
        rates.lr, state["qmap1"], state.get("qmap2"), state["absmax1"], state.get("absmax2"), rates.weight_decay,
    )  # fmt: skip


def _float32_step(rule: Rule, parameter: Tensor, grad: Tensor, state: dict[str, Any], rates: Rates) -> None:
    """Of a small tensor, whose moments are not quantized."""
    from bitsandbytes.functional import optimizer_update_32bit

    optimizer_update_32bit(
        rule, grad, parameter, state["state1"], rates.betas[0], rates.eps, state["step"], rates.lr,
        state.get("state2"), rates.betas[1], weight_decay=rates.weight_decay,
    )  # fmt: skip


def numbers_of(rule: Rule, step: int, rates: Rates) -> list[float]:
    """What a step multiplies with, as cpp/optimizer.h takes it."""
    (beta1, beta2), keep = rates.betas, 1.0 - rates.lr * rates.weight_decay
    shared = [keep, beta1, 1.0 - beta1, beta2, 1.0 - beta2]
    if rule == "lion":
        return [*shared, rates.lr]
    return [*shared, -rates.lr / (1.0 - beta1**step), 1.0 / sqrt(1.0 - beta2**step), rates.eps]


@cache
def dynamic_map(signed: bool) -> Tensor:
    """What the 256 codes stand for, rising, in units of a block's largest number."""
    from bitsandbytes.functional import create_dynamic_map

    found: Tensor = create_dynamic_map(signed=signed)
    return found


@cache
def nearest_codes(signed: bool) -> Tensor:
    """The code that bitsandbytes gives each of STEPS_OF_MAP numbers from -1 to 1, uint8, on a CPU."""
    from bitsandbytes.functional import quantize_blockwise

    steps = torch.linspace(-1, 1, STEPS_OF_MAP, dtype=torch.float64).float().view(-1, MOMENT_BLOCK // 2)
    blocks = torch.cat((torch.ones_like(steps), steps), dim=1)  # the largest of each is 1
    codes, _ = quantize_blockwise(blocks, code=dynamic_map(signed).clone(), blocksize=MOMENT_BLOCK)
    found: Tensor = codes.view(blocks.shape)[:, MOMENT_BLOCK // 2 :].flatten()
    return found
