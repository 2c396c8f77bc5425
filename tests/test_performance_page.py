"""docs/performance.md: every figure is of a result file, every table as benchmarks/page_performance.py makes it."""

from __future__ import annotations

import json

import pytest

from benchmarks.__main__ import PARTS, main
from benchmarks.page_performance import MARKED, PAGE, TABLES, made
from benchmarks.shared.record import PUBLISHED


def test_the_tables_are_what_was_measured() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert "train_cpu" in MARKED.findall(page)
    assert made(page) == page, "python -m benchmarks.page_performance writes them anew"


def test_every_table_stands_between_marks() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert "\n|" not in MARKED.sub("", page)


def test_the_losses_are_those_of_the_others() -> None:
    for arm in json.loads((PUBLISHED / "train_cpu.json").read_text(encoding="utf-8"))["arms"].values():
        for ours, theirs in zip(arm["losses"]["ours"], arm["losses"]["stock_best"], strict=True):
            assert abs(ours - theirs) < 2e-3 * theirs


def test_200_steps_are_as_near_to_float32_as_the_references_own_bf16() -> None:
    for found in json.loads((PUBLISHED / "curves.json").read_text(encoding="utf-8"))["strategies"].values():
        slow, fast, wide = (
            found[f"{arm}, from float32 plain"] for arm in ("bf16, plain", "bf16, fast", "float32, fast")
        )
        assert fast["mean"] < 1.25 * slow["mean"]
        assert fast["at_the_end"] < 2 * max(slow["at_the_end"], 1e-3)
        assert wide["mean"] < slow["mean"] / 10


def test_every_part_has_a_table_and_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert PARTS.keys() <= TABLES.keys()
    assert main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(PARTS)
    assert main(["startup", "trian_cpu"]) == 2
    assert capsys.readouterr().err == f"trian_cpu: no such part; there are {', '.join(PARTS)}\n"
