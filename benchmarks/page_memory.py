"""The generated tables of docs/memory.md: what is planned now, and what benchmarks/results/plan.json measured.

.venv/bin/python -m benchmarks.page_memory       write them into the page
"""

from __future__ import annotations

import json
import re

from benchmarks.plan import ARMS, planned
from benchmarks.shared.record import ROOT
from gemma_ft.families.records import PUBLISHED
from gemma_ft.plan.shape import preset_shape
from gemma_ft.ui.plan import inference_lines, training_lines

PAGE = ROOT / "docs" / "memory.md"


def tables() -> dict[str, str]:
    """The text of each table, by the name of its place in the page."""
    shapes = [preset_shape(name) for name in PUBLISHED]
    training = ["\n".join([shape.name, *training_lines(shape)[:-1]]) for shape in shapes]
    return {
        "answers": "```\n" + "\n".join(inference_lines(shapes)) + "\n```",
        "training": "```\n" + "\n\n".join(training) + "\n```",
        "measured": _measured(),
    }


def with_tables(page: str) -> str:
    """The page with its tables as they are now."""
    for name, text in tables().items():
        page = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, text=text: f"{m[1]}{text}\n{m[2]}", page,
                      flags=re.DOTALL)  # fmt: skip
    return page


def errors() -> dict[str, float]:
    """Of each run's plan as it is now, relative to what was measured, on the kind of machine that measured it."""
    return {name: plan / measured - 1 for name, (plan, measured) in _compared().items()}


def _compared() -> dict[str, tuple[int, int]]:
    """Bytes of each run: planned, and measured."""
    result = json.loads((ROOT / "benchmarks" / "results" / "plan.json").read_text(encoding="utf-8"))
    return {
        name: (sum(planned(arm, widened=result["arms"][name]["widened"]).values()), result["arms"][name]["measured"])
        for name, arm in ARMS.items()
    }


def _measured() -> str:
    rows = ["| | tokens | planned MiB | measured MiB | error |", "|---|---|---|---|---|"]
    for name, (plan, measured) in _compared().items():
        arm = ARMS[name]
        tokens = f"{arm.rows} x {arm.tokens:,}" if arm.phase != "merge" else ""
        sizes = f"{plan / 2**20:,.0f} | {measured / 2**20:,.0f}"
        rows.append(f"| {name} | {tokens} | {sizes} | {plan / measured - 1:+.1%} |")
    return "\n".join(rows)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
