"""Figures as short texts for a reader; a dash where there is nothing to show."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

NOTHING = "–"


def number(value: Any, digits: int = 4) -> str:
    """A loss or another plain figure."""
    return f"{value:,.{digits}f}" if is_figure(value) else NOTHING


def percent(share: Any) -> str:
    """A share, 0 to 1, as percent."""
    return f"{share:.1%}" if is_figure(share) else NOTHING


def count(value: Any) -> str:
    """A whole number with separators."""
    return f"{round(value):,}" if is_figure(value) else NOTHING


def gib(value: Any) -> str:
    """Bytes as GiB."""
    return f"{value / 2**30:.2f} GiB" if is_figure(value) else NOTHING


def duration(seconds: Any) -> str:
    """Seconds as 41.2 s, 12 min 03 s or 5 h 02 min."""
    if not is_figure(seconds):
        return NOTHING
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def is_figure(value: Any) -> TypeGuard[float]:
    """Whether a value, read from a file perhaps, is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
