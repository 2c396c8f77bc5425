"""`gemma-ft preview` as a user calls it: rows by name, the page, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemma_ft.cli.app import main

REPO_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A recipe over 30 rows in the current directory; the fourth has no answer, the fifth is too long."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"number {number}", "completion": "yes"} for number in range(1, 31)]
    rows[3]["completion"] = ""
    rows[4]["prompt"] = "word " * 80
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [f"model.weights={REPO_ROOT / 'data' / 'gemma-tiny'}", "data.train=rows.jsonl", "data.eval=null"]
    return ["sft_tiny", *overrides, "data.max_seq_len=64", "train.global_batch_size=4"]


def test_rows_are_shown_by_name(recipe: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", *recipe, "--row-id", "rows.jsonl:12", "--row-id", "29"]) == 0
    shown = capsys.readouterr().out
    titles = [line for line in shown.splitlines() if line.endswith("◀ asked for")]
    assert [title.split(" · ")[1] for title in titles] == ["rows.jsonl:12", "rows.jsonl:29"]
    assert "number 12<end_of_turn>" in shown
    assert "1 dropped: empty question, answer or text" in shown
    assert "optimizer steps of 4 examples" in shown


def test_rows_that_are_not_there_are_a_line_each(recipe: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", *recipe, "--row-id", "4", "--row-id", "rows.jsonl:5", "--row-id", "31"]) == 2
    found = capsys.readouterr()
    assert found.err.splitlines() == [
        "4: gives nothing to train on: the line is blank, or its row was dropped (an empty question, answer or text); "
        "nearest: rows.jsonl:3 and rows.jsonl:6",
        "rows.jsonl:5: was dropped: its 255 tokens do not fit into data.max_seq_len 64; raise that",
        "31: is not among the rows that are read from rows.jsonl; nearest: rows.jsonl:30",
    ]
    assert "example" not in found.out


def test_a_held_out_row_is_told(recipe: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    split = [*recipe, "data.eval_fraction=0.3"]
    codes = {number: main(["preview", *split, "--row-id", str(number)]) for number in (1, 2, 3, 6, 7, 8, 9, 10, 11)}
    told = capsys.readouterr().err.splitlines()
    held_out = [number for number, code in codes.items() if code == 2]
    assert 0 < len(held_out) < 9
    assert told == [f"rows.jsonl:{number}: is held out, not trained on; name another row" for number in held_out]


def test_a_page_is_written_and_replaced(recipe: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("out.html").write_text("<html>older</html>")
    assert main(["preview", *recipe, "--rows", "1", "--html", "out.html"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "page: out.html"
    page = Path("out.html").read_text(encoding="utf-8")
    assert "<title>Preview of sft_tiny.yaml</title>" in page
    assert "rows.jsonl:1" in page
    assert "older" not in page


def test_a_page_without_a_folder_is_one_line(recipe: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", *recipe, "--html", "nowhere/out.html"]) == 2
    found = capsys.readouterr()
    assert found.err == "nowhere/out.html: there is no folder nowhere; make it, or name another file with --html\n"
    assert found.out == ""  # told before any work
    assert not Path("nowhere").exists()


def test_a_fault_is_exit_code_2_and_on_the_page(
    recipe: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gemma_ft.data.check.preview.broken_invariants", lambda *_: ["example 1: no token is trained"])
    assert main(["preview", *recipe]) == 2
    assert "✗ example 1: no token is trained" in capsys.readouterr().out
    assert main(["preview", *recipe, "--html", "out.html"]) == 2
    assert "✗ example 1: no token is trained" in Path("out.html").read_text(encoding="utf-8")
