"""docs/performance.md: every figure is of a result file."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
RESULT = json.loads((ROOT / "benchmarks" / "results" / "train_cpu.json").read_text(encoding="utf-8"))


def test_the_table_is_what_was_measured() -> None:
    rows = {cells[0].strip(" `"): [one.strip() for one in cells[1:]] for cells in _rows()}
    assert rows.keys() == RESULT["arms"].keys()
    for name, cells in rows.items():
        arm = RESULT["arms"][name]
        speed, memory, over = arm["tokens_per_second"], arm["above_the_model_mib"], arm["ours_over"]
        assert cells == [
            *(f"{speed[one]:,.0f}" for one in ("ours", "stock", "stock_best")),
            f"{over['stock']:.1f}x",
            f"{over['stock_best']:.1f}x",
            f"{memory['ours'] / memory['stock_best']:.2f}",
            f"{arm['of_the_limit']:.0%}",
        ]


def test_the_losses_are_those_of_the_others() -> None:
    for arm in RESULT["arms"].values():
        for ours, theirs in zip(arm["losses"]["ours"], arm["losses"]["stock_best"], strict=True):
            assert abs(ours - theirs) < 2e-3 * theirs


def _rows() -> list[list[str]]:
    return [line.strip("| ").split("|") for line in PAGE.splitlines() if re.match(r"\| `\w+` \|", line)]
