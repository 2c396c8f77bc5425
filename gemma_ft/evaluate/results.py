"""What was measured of several models, and what it says about them: estimates of each, differences of each pair."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from gemma_ft.evaluate.held_out import Reply
from gemma_ft.evaluate.statistics import Estimate, Figure, Floats, difference, estimate


@dataclass(frozen=True)
class Scored:
    """A figure of one model over rows that other models were scored on too; rows None: the value alone is known."""

    rows: Floats | None
    figure: Figure
    value: float | None = None

    def estimated(self) -> Estimate:
        """The figure with its interval."""
        if self.rows is None:
            assert self.value is not None
            return Estimate(self.value, None, None, 0)
        return estimate(self.rows, self.figure)


@dataclass
class Measured:
    """What was measured of one model: figures by metric, figures of tasks, and its answers."""

    scores: dict[str, Scored] = field(default_factory=dict)
    tasks: dict[str, dict[str, Scored]] = field(default_factory=dict)
    replies: list[Reply] = field(default_factory=list)


def estimates_of(scores: dict[str, Scored]) -> dict[str, Any]:
    """Metric -> value, low, high, rows."""
    return {metric: one.estimated().as_dict() for metric, one in scores.items()}


def differences_of(measured: dict[str, Measured]) -> list[dict[str, Any]]:
    """Every later model less every earlier one, metric by metric, on the same rows."""
    found: list[dict[str, Any]] = []
    for (earlier, first), (later, last) in combinations(measured.items(), 2):
        for metric, one in _all_scores(last).items():
            other = _all_scores(first)[metric]
            if one.rows is None or other.rows is None:
                continue
            gap = difference(one.rows, other.rows, one.figure)
            found.append({"of": later, "minus": earlier, "metric": metric, **gap.as_dict()})
    return found


def _all_scores(measured: Measured) -> dict[str, Scored]:
    """Figures of held-out rows and of tasks under one name each; a task's is `task: metric`."""
    tasks = {f"{task}: {metric}": one for task, figures in measured.tasks.items() for metric, one in figures.items()}
    return measured.scores | tasks
