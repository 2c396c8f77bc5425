"""Arms in turns, forwards and backwards, and ratios by pairs, so that a machine's mood meets all alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

Found = TypeVar("Found")
QUICK = "--quick"  # an argument of every part: one turn and little work, to see that it runs


def order(arms: Sequence[str], turns: int) -> Iterator[str]:
    """A B C, C B A, A B C, ..."""
    for turn in range(turns):
        yield from arms if turn % 2 == 0 else reversed(arms)


def in_turns(arms: Mapping[str, Callable[[], Found]], turns: int) -> dict[str, list[Found]]:
    """What each arm gave, one after the other for `turns` turns."""
    found: dict[str, list[Found]] = {name: [] for name in arms}
    for name in order(list(arms), turns):
        found[name].append(arms[name]())
    return found


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """ours / theirs, turn by turn: the median, and the quartiles of it."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"median": round(statistics.median(ratios), 3), "low": round(low, 3), "high": round(high, 3)}
