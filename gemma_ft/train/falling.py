"""A run that makes the chosen answers less likely as well: margins grow all the same, where the rejected ones fall
faster, and neither loss nor accuracy shows it.

Sources: arXiv:2402.13228 (DPO-Positive) and 2410.08847 (likelihood displacement).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_ft.system.units import number

STEPS = 50
CLEAR = 3.0  # standard errors between the halves of the steps that are looked at
CHOSEN, MARGIN = "logps/chosen", "rewards/margins"


def chosen_falls(figures: Mapping[str, Any], past: dict[str, Any], sft_weight: float | None) -> str | None:
    """What is to be said after a step of which `figures` came: one line, the first time that over the last STEPS steps
    the chosen answers got less likely while margins grew. `past` is kept from step to step, and holds what JSON can.
    sft_weight: that of the objective, None where it has none.
    """
    now = [figures.get(CHOSEN), figures.get(MARGIN)]
    if past.get("told") or any(value is None or not math.isfinite(value) for value in now):
        return None
    past["recent"] = [*past.get("recent", []), now][-STEPS:]
    chosen, margins = ([step[at] for step in past["recent"]] for at in (0, 1))
    if len(chosen) < STEPS or _rise(chosen) > -CLEAR or _rise(margins) < CLEAR:
        return None
    past.update(told=True, recent=[])
    before, after = (number(statistics.fmean(half), 1) for half in _halves(chosen))
    add = "" if sft_weight is None else f"set objective.sft_weight above {sft_weight:g}, "
    return (
        f"step {figures['step']}: over {STEPS} steps the chosen answers got less likely ({CHOSEN} {before} -> {after}) "
        f"while margins grew: probability moves to answers in neither half; {add}lower train.learning_rate, or stop "
        "earlier"
    )


def _halves(values: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    return values[: STEPS // 2], values[STEPS // 2 :]


def _rise(values: Sequence[float]) -> float:
    """By how many standard errors the mean of the later half lies above that of the earlier one."""
    before, after = _halves(values)
    error = math.sqrt((statistics.variance(before) + statistics.variance(after)) / (STEPS // 2))
    return (statistics.fmean(after) - statistics.fmean(before)) / max(error, 1e-12)
