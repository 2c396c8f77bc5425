"""The learning rate as a pure function of the step, so that a resumed run needs nothing but its step number."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]


def learning_rate_factor(step: int, *, total_steps: int, warmup_steps: int, schedule: Schedule) -> float:
    """The factor on the peak learning rate for optimizer step `step` (counted from 0), in (0, 1].

    Warm-up rises from 1 / warmup_steps to 1; then the factor stays, falls linearly, or along half a cosine, to reach
    zero one step after the last. The libraries' schedules give the first step (and with one warm-up step, a one-step
    run) a learning rate of exactly zero; this one never does. Source: arXiv:1608.03983 eq. 5 without restarts.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
