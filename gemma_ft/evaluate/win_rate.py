"""How often the answers of a tuned model are better than those before, also where both are equally long.

Letters: N answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_ft.evaluate import statistics

STEPS, RIDGE = 50, 1e-2  # of Newton's method; how strongly both coefficients are held to 0, where all rows agree


def win_rate(before: Sequence[float], after: Sequence[float], lengths: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Scores [N] of the answers before and after training, and the lengths of both -> the share of better answers (a
    tie counts a half) with its interval, the same for equally long ones, and the mean lengths.

    Length-controlled: a logistic regression of who won on tanh of the difference in length over its standard
    deviation, read at a difference of 0; None where all answers grew, or all shrank, or the won and the lost ones have
    no length in common, so that no regression says what would be at 0. Source: arXiv:2404.04475.
    """
    wins = (np.sign(np.asarray(after, float) - np.asarray(before, float)) + 1) / 2
    size = np.asarray(lengths, float).reshape(-1, 2)
    rows = np.stack((wins, np.ones_like(wins)), axis=1)
    found = statistics.estimate(rows, statistics.mean).as_dict()
    return {
        **found,
        "length_controlled": _at_equal_lengths(wins, size[:, 1] - size[:, 0]),
        "length_before": float(size[:, 0].mean()),
        "length_after": float(size[:, 1].mean()),
    }


def _at_equal_lengths(wins: Any, longer: Any) -> float | None:
    """The probability of a win at no difference in length."""
    if not longer.min() <= 0 <= longer.max():
        return None
    won, lost = longer[wins > 0], longer[wins < 1]  # a tie is of both
    if not longer.any() or not len(won) or not len(lost):
        return float(wins.mean())
    if won.min() > lost.max() or lost.min() > won.max():
        return None
    inputs = np.stack((np.ones_like(wins), np.tanh(longer / float(longer.std()))), axis=1)
    weights = np.zeros(2)
    for _ in range(STEPS):
        sure = 1 / (1 + np.exp(-inputs @ weights))
        slope = inputs.T @ (sure - wins) + RIDGE * weights
        curvature = (inputs * (sure * (1 - sure))[:, None]).T @ inputs + RIDGE * np.eye(2)
        weights = weights - np.linalg.solve(curvature, slope)
    return float(1 / (1 + np.exp(-weights[0])))
