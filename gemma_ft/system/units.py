"""Figures as short texts for a reader; a dash where there is nothing to show."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeGuard

NOTHING = "–"
ByteUnit = Literal["B", "kB", "MB", "GB", "GiB"]
BYTES: dict[ByteUnit, float] = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "GiB": 2**30}
DECIMAL: tuple[ByteUnit, ...] = ("GB", "MB", "kB")


def number(value: Any, digits: int = 4) -> str:
    """A loss or another plain figure."""
    return f"{value:,.{digits}f}" if is_figure(value) else NOTHING


def percent(share: Any) -> str:
    """A share, 0 to 1, as percent."""
    return f"{share:.1%}" if is_figure(share) else NOTHING


def count(value: Any) -> str:
    """A whole number with separators."""
    return f"{round(value):,}" if is_figure(value) else NOTHING


def byte_size(value: Any, unit: ByteUnit | None = "GiB", digits: str = ".2f") -> str:
    """Bytes in `unit`, written as the format `digits` says: of memory in GiB, of files in GB. unit None: in the largest
    of GB, MB and kB of which there is one.
    """
    if not is_figure(value):
        return NOTHING
    shown = unit if unit is not None else _largest(value)
    return f"{value / BYTES[shown]:{digits if shown != 'B' else '.0f'}} {shown}"


def _largest(value: float) -> ByteUnit:
    return next((unit for unit in DECIMAL if value >= BYTES[unit]), "B")


def duration(seconds: Any, *, in_seconds: bool = False) -> str:
    """Seconds as 41.2 s, 12 min 03 s or 5 h 02 min; `in_seconds`: as 723.0 s however many they are."""
    if not is_figure(seconds):
        return NOTHING
    if seconds < 120 or in_seconds:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def is_figure(value: Any) -> TypeGuard[float]:
    """Whether a value, read from a file perhaps, is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
