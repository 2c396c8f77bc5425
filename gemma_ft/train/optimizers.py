"""The optimizers of a recipe: torch's fused AdamW, and AdamW and Lion with moments in 8 bits.

What the latter keep for a parameter is what bitsandbytes' own optimizers keep, under the same names, so that a
checkpoint is the same; kernels/optimizer_step.py says what steps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from gemma_ft.errors import UserError
from gemma_ft.kernels.optimizer_step import Rates, Rule, new_moments, optimizer_step
from gemma_ft.recipe.schema import Train
from gemma_ft.system.limits import SMALLEST_IN_8BIT
from gemma_ft.train.distributed import World

OptimizerClass = tuple[type[torch.optim.Optimizer], dict[str, Any]]
ADAM, LION = ((0.9, 0.999), 1e-8), ((0.9, 0.99), 0.0)  # betas and epsilon. Source: bitsandbytes optim/adamw.py, lion.py


class EightBitOptimizer(torch.optim.Optimizer):
    """AdamW (`rule` adam) or Lion with moments in 8 bits; those of small tensors stay in float32."""

    def __init__(
        self, params: Iterable[Any], *, rule: Rule, lr: float, betas: tuple[float, float], eps: float,
        weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.rule = rule

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """A step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rates = Rates(float(group["lr"]), tuple(group["betas"]), group["eps"], group["weight_decay"])
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(new_moments(self.rule, parameter))
                state["step"] = int(state["step"])  # a tensor where a checkpoint was loaded
                optimizer_step(self.rule, parameter, parameter.grad, state, rates)
        return loss


def optimizer_of(train: Train) -> OptimizerClass | None:
    """The class of a recipe's optimizer and what it is made with, beside its parameters and their decay; None for the
    one that TRL makes by itself (settings.py).
    """
    if train.optimizer == "adamw":
        return None
    rule: Rule = "adam" if train.optimizer == "adamw8bit" else "lion"
    betas, eps = ADAM if rule == "adam" else LION
    return EightBitOptimizer, {"rule": rule, "lr": train.learning_rate, "betas": betas, "eps": eps}


def check_optimizer(train: Train, world: World) -> None:
    """Raises: UserError where the moments cannot be cut into the slices of ranks."""
    if train.optimizer != "adamw" and world.layout == "fsdp2":
        raise UserError(
            f"train.optimizer: {train.optimizer}: its blocks of moments would depend on the number of ranks of FSDP2; "
            "use adamw, or --launch ddp"
        )


def describe_optimizer(train: Train, model: torch.nn.Module) -> str | None:
    """What keeps moments in how many bits, for the user; None of plain AdamW."""
    if train.optimizer == "adamw":
        return None
    sizes = [one.numel() for one in model.parameters() if one.requires_grad]
    small = sum(size for size in sizes if size < SMALLEST_IN_8BIT)
    kept = f", {small:,} in float32 (tensors under {SMALLEST_IN_8BIT:,})" if small else ""
    return f"{train.optimizer}: moments of {sum(sizes) - small:,} weights in 8 bits{kept}"
