"""docs/performance.md: every figure is of a result file, every table what benchmarks/tables.py makes of it."""

from __future__ import annotations

import json

from benchmarks.record import PUBLISHED
from benchmarks.tables import MARKED, PAGE, made


def test_the_tables_are_what_was_measured() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert "train_cpu" in MARKED.findall(page)
    assert made(page) == page, "python -m benchmarks.tables writes them anew"


def test_every_table_stands_between_marks() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert "\n|" not in MARKED.sub("", page)


def test_the_losses_are_those_of_the_others() -> None:
    for arm in json.loads((PUBLISHED / "train_cpu.json").read_text(encoding="utf-8"))["arms"].values():
        for ours, theirs in zip(arm["losses"]["ours"], arm["losses"]["stock_best"], strict=True):
            assert abs(ours - theirs) < 2e-3 * theirs
