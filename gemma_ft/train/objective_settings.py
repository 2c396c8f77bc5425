"""The objective of a run out of its recipe, with what its settings take from the data."""

from __future__ import annotations

from typing import Any

from gemma_ft.build.data import BuiltData
from gemma_ft.errors import DataError
from gemma_ft.recipe.objectives import KahnemanTversky
from gemma_ft.recipe.schema import Recipe
from gemma_ft.train.objectives.registry import Objective, build_objective

MOST = 4 / 3  # of desirable over undesirable rows, each as often as its weight says; 1 at least


def objective_of(recipe: Recipe, data: BuiltData) -> Objective:
    """What a recipe says is minimized. Raises: DataError, as settings_of."""
    return build_objective(recipe.objective.kind, **settings_of(recipe, data))


def settings_of(recipe: Recipe, data: BuiltData) -> dict[str, Any]:
    """What an objective is built with. Raises: DataError where rows to be told apart are all of one kind."""
    settings = recipe.objective.model_dump(exclude={"kind", "dropout", "reference", "judge"})
    if isinstance(recipe.objective, KahnemanTversky):
        settings |= _weights(recipe.objective, data)
    return settings


def _weights(objective: KahnemanTversky, data: BuiltData) -> dict[str, Any]:
    """The weights of both labels; where the recipe has none, the rarer label gets as much as brings their shares to
    between 1 and 4/3. Source: arXiv:2402.01306 section 4.2, eq. 9.
    """
    examples: Any = data.train.examples  # of what is streamed the first block
    why = examples.one_label()
    if why is not None:
        raise DataError(f"{data.train_source}: {why}")
    good, bad = examples.labels()
    if objective.desirable_weight is not None or objective.undesirable_weight is not None:
        return {
            "desirable_weight": objective.desirable_weight or 1.0,
            "undesirable_weight": objective.undesirable_weight or 1.0,
        }
    ratio = good / bad
    return {
        "desirable_weight": 1 / ratio if ratio < 1 else 1.0,
        "undesirable_weight": ratio / MOST if ratio > MOST else 1.0,
    }
