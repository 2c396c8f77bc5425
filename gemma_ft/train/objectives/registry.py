"""What an objective is, and where it is found: each file beside this one is one, under the name of the file.

Letters: B sequences of a micro-batch, T tokens.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor

from gemma_ft.train import objectives

Batch = Mapping[str, Tensor]


class Objective(Protocol):
    """What a run minimizes: sum of `objective(logprobs, batch)` over the micro-batches of a step and all ranks, divided
    once by the sum of `divisor(batch)` over the same ones. So no result depends on how a step is cut.

    The loop takes any: it puts the derivative of the sum into the fused head, as a weight of each token.
    """

    needs_logprobs: bool  # False: the derivative is the same whatever the log-probabilities are, which are not computed

    def divisor(self, batch: Batch) -> float:
        """How many tokens, rows or pairs of a micro-batch the loss is a mean of; 0 for a blank one."""

    def __call__(self, logprobs: Tensor, batch: Batch) -> Tensor:
        """log p of each label given the tokens before it, [B, T] in float32 or wider and 0 where there is no label ->
        the scalar sum of a micro-batch's terms, differentiable, which is also what is logged.

        `batch`: labels [B, T] and what else the collator made, on the device of `logprobs`; data's own weights are its
        `loss_weights` [B, T], for the objective to use.
        """


def objective_names() -> list[str]:
    """The objectives there are."""
    own = __name__.rpartition(".")[2]
    return sorted(module.name for module in pkgutil.iter_modules(objectives.__path__) if module.name != own)


def build_objective(name: str, **settings: Any) -> Objective:
    """The objective in the file of that name, by the `build` of that file, which takes its settings."""
    assert name in objective_names(), f"no objective {name}: there are {', '.join(objective_names())}"
    objective: Objective = import_module(f"{objectives.__name__}.{name}").build(**settings)
    return objective
