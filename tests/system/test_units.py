"""Figures as texts: bytes and durations, each by one function."""

from __future__ import annotations

import math

import pytest

from gemma_ft.system.units import NOTHING, byte_size, count, duration, number, percent


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ((3 * 2**29,), "1.50 GiB"),
        ((0,), "0.00 GiB"),
        ((5000 * 2**30, "GiB", ",.1f"), "5,000.0 GiB"),
        ((1_234_567_890, "GB", ".3g"), "1.23 GB"),
        ((1_234_567_890, "MB", ",.1f"), "1,234.6 MB"),
        ((999, None, ".1f"), "999 B"),
        ((1000, None, ".1f"), "1.0 kB"),
        ((2_500_000, None, ".1f"), "2.5 MB"),
        ((54e9, None, ".1f"), "54.0 GB"),
        ((None,), NOTHING),
        ((math.nan, None, ".1f"), NOTHING),
        ((True,), NOTHING),
    ],
)
def test_bytes(given: tuple[object, ...], text: str) -> None:
    assert byte_size(*given) == text  # type: ignore[arg-type]


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0, 41.24, 119.94, 120, 723, 7199, 7200, 18_120)] == [
        "0.0 s", "41.2 s", "119.9 s", "2 min 00 s", "12 min 03 s", "119 min 59 s", "2 h 00 min", "5 h 02 min"
    ]  # fmt: skip
    assert (duration(723, in_seconds=True), duration(None, in_seconds=True)) == ("723.0 s", NOTHING)


def test_what_is_no_figure_is_a_dash() -> None:
    for text in (number, percent, count, duration):
        assert [text(value) for value in (None, math.inf, "7", False)] == [NOTHING] * 4
    assert (number(1234.5), percent(0.125), count(1234.6)) == ("1,234.5000", "12.5%", "1,235")
