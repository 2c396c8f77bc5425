"""docs/memory.md: its tables are the planner's and the measurement's, and every plan is within 10% of what it plans."""

from __future__ import annotations

import json

import pytest

from benchmarks.page_memory import PAGE, errors, with_tables
from benchmarks.plan import ARMS, WITHIN, planned
from benchmarks.shared.record import ROOT
from gemma_ft.ui import plan as show

RESULT = json.loads((ROOT / "benchmarks" / "results" / "plan.json").read_text(encoding="utf-8"))


def test_the_tables_are_what_is_planned_and_measured() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page) == page, "python -m benchmarks.page_memory writes them anew"


def test_all_arms_were_measured() -> None:
    assert RESULT["arms"].keys() == ARMS.keys()
    assert RESULT["grid"] == {name: vars(arm) for name, arm in ARMS.items()}


@pytest.mark.parametrize("name", ARMS)
def test_a_plan_of_today_is_within_a_tenth_of_what_was_measured(name: str) -> None:
    arm = RESULT["arms"][name]
    assert sum(planned(ARMS[name], widened=arm["widened"]).values()) == pytest.approx(arm["measured"], rel=WITHIN)


def test_the_verb_says_the_errors_of_the_page() -> None:
    found = errors().values()
    told = (show.MEASURED_RUNS, show.LEAST_ERROR, show.GREATEST_ERROR)
    assert told == (len(found), round(min(found), 3), round(max(found), 3))
