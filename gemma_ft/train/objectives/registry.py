"""What an objective is, and where it is found: each file beside this one and `answers` is one, under the name of the
file.

Letters: B sequences of a micro-batch, T tokens, A answers, P pairs.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor

from gemma_ft.data.conversation import RowKind
from gemma_ft.train import objectives

Batch = Mapping[str, Tensor]
Figures = dict[str, tuple[float, float]]
NO_OBJECTIVES = ("answers", "registry")


class Objective(Protocol):
    """What a run minimizes: a sum of terms, each (sum of its values over the micro-batches of a step and all ranks) /
    (sum of its divisors over the same ones). So no result depends on how a step is cut.

    The loop takes any: it puts the derivative into the fused head, as a weight of each token.

    `batch`: labels [B, T] and what else the collator made, on one device. Of rows that are "answers" the data's own
    weights are its `loss_weights` [B, T]; the batches of the others are described in `objectives/answers.py`.
    """

    @property
    def rows(self) -> RowKind:
        """What its rows are."""

    @property
    def needs_logprobs(self) -> bool:
        """False: the derivative is the same whatever the log-probabilities are, which are not computed; one term."""

    @property
    def needs_reference(self) -> bool:
        """Whether `batch` is to have `reference_logprobs`, so that a model to compare with is needed."""

    @property
    def needs_baseline(self) -> bool:
        """Whether `batch` is to have `kl_baseline`, which is of the whole step and so found before."""

    @property
    def scores(self) -> bool:
        """True: what is given in place of log-probabilities is one number per answer, [A]."""

    def divisors(self, batch: Batch) -> tuple[float, ...]:
        """Of each term, how many tokens, rows or pairs of a micro-batch it is a mean of; zeros for a blank one."""

    def __call__(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """log p of each label given the tokens before it, [B, T] in float32 or wider and 0 where there is no label ->
        the sum of each term over a micro-batch, scalars, differentiable, which are also what is logged.
        """

    def figures(self, logprobs: Tensor, batch: Batch) -> Figures:
        """What a micro-batch shows besides its loss, without gradient: name -> (numerator, denominator), to be summed
        over a step and divided once; the same names for every batch, a blank one too. {} where there is nothing.
        """

    def loss_at_start(self, batch: Batch) -> float | None:
        """The first term's sum over a micro-batch where the model is its reference (`scores`: where all are 0), to be
        divided like it; None where nothing is known of it.
        """


def objective_names() -> list[str]:
    """The objectives there are."""
    names = {module.name for module in pkgutil.iter_modules(objectives.__path__)}
    return sorted(names - set(NO_OBJECTIVES))


def build_objective(name: str, **settings: Any) -> Objective:
    """The objective in the file of that name, by the `build` of that file, which takes its settings."""
    assert name in objective_names(), f"no objective {name}: there are {', '.join(objective_names())}"
    objective: Objective = import_module(f"{objectives.__name__}.{name}").build(**settings)
    return objective
