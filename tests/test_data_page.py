"""docs/data.md: its examples are read as the formats that it says, and its figures are those of the result files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from gemma_ft.data.conversation import RowKind
from gemma_ft.data.read.bad_rows import BadRows
from gemma_ft.data.read.detect import detect_format
from gemma_ft.data.read.parse_rows import parse_row, parse_rows
from gemma_ft.data.read.sources import Row
from gemma_ft.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^`(\w+)`:[^\n]*\n```json\n(.*?)```", PAGE, re.M | re.S)
RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize(("form", "lines"), EXAMPLES)
def test_each_example_is_what_it_says(form: str, lines: str) -> None:
    rows = [Row(f"x:{number}", json.loads(line)) for number, line in enumerate(lines.splitlines(), start=1)]
    assert all(detect_format([row])[0] == form for row in rows)
    assert len(rows) == 5
    assert len(parse_rows(rows)) >= len(rows)


@pytest.mark.parametrize(("title", "kind"), [("Pairs", "pairs"), ("Labelled answers", "labelled")])
def test_preferences_are_what_they_say(title: str, kind: RowKind) -> None:
    (lines,) = re.findall(rf"^{title}:\n```json\n(.*?)```", PAGE, re.M | re.S)
    bad = BadRows()
    for line in lines.splitlines():
        row = Row("x:1", json.loads(line))
        assert parse_row(row, detect_format([row], kind=kind)[0], {}, bad, rows=kind)
    assert (bad.rows, len(lines.splitlines())) == ([], 5)


def test_every_format_has_its_example() -> None:
    from gemma_ft.data.read.row_format import formats

    assert [form for form, _ in EXAMPLES] == [
        "messages",
        "sharegpt",
        "alpaca",
        "prompt_completion",
        "preference",
        "text",
    ]
    assert {form for form, _ in EXAMPLES} == set(formats())


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", PAGE, re.S))
def test_the_recipes_lines_are_valid(block: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"extends: sft_tiny\n{block}")
    assert load_recipe(tmp_path / "r.yaml").recipe.data.train
    assert yaml.safe_load(block)["data"]


def test_the_figures_of_added_tokens_are_measured() -> None:
    found = json.loads((RESULTS / "added_tokens.json").read_text())
    ours, peft = (found["figures"][arm]["above_the_built_model_bytes"] / 1e9 for arm in ("ours", "peft"))
    said = (
        f"it took {found['peft_over_ours']:.1f} times as long and {peft:.1f} GB above the model instead of {ours:.1f}"
    )
    assert said in " ".join(PAGE.split())


def test_the_figures_are_measured() -> None:
    both, large = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("encoding", "encoding_large"))
    assert f"{both['times_as_fast']:.1f} times as fast as `datasets.map`" in PAGE
    seconds, peak = large["figures"]["seconds"], large["figures"]["peak_bytes"]
    assert f"a million rows take {seconds:.0f} s and {peak / 2**30:.1f} GiB" in " ".join(PAGE.split())
