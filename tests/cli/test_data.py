"""`gemma-ft data check` and `data fix`: what is printed and written, exit codes, one line for every misuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_ft.cli.app import main

Write = Callable[..., str]
GOOD = [(f"Which city is number {n}?", f"It is city {n}, as people say.") for n in range(8)]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes question/answer rows in the current directory, a text as it is; gives the file's name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def rows(name: str, *pairs: tuple[str, str] | str) -> str:
        lines = [one if isinstance(one, str) else json.dumps({"question": one[0], "answer": one[1]}) for one in pairs]
        Path(name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return name

    return rows


def check(train: str, *more: str, held_out: str = "null") -> int:
    return main(["data", "check", "sft_tiny", f"data.train={train}", f"data.eval={held_out}", *more])


def test_sound_rows(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(write("train.jsonl", *GOOD)) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("train  train.jsonl: 8 rows, ")
    assert out[0].endswith(" trained (prompt_completion: the rows have question, answer)")
    assert out[1:] == ["nothing found", "report: data_report.json"]
    report = json.loads(Path("data_report.json").read_text())
    assert list(report) == ["severity", "max_seq_len", "sources", "scripts", "findings", "bad_rows"]
    assert (report["severity"], report["max_seq_len"], report["findings"]) == (None, 512, [])


def test_what_is_found_is_printed_and_written(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    train = write("train.jsonl", *GOOD, GOOD[0], *["{"] * 25)
    assert check(train, "--out", "found.json", held_out=write("eval.jsonl", GOOD[3], ("Mail?", "a@b.co"))) == 2
    out = capsys.readouterr().out
    assert [line.split("│")[1:3] for line in out.splitlines() if "│ " in line and line.split("│")[1].strip()] == [
        [" error    ", "   25 "], [" error    ", "    1 "], [" warning  ", "    1 "], [" note     ", "    1 "],
    ]  # fmt: skip
    fault = "not valid JSON: Expecting property name enclosed in double quotes (column 2)"
    bad = [f"train.jsonl:{number}: {fault}" for number in range(10, 35)]
    at = out.splitlines().index(bad[0])
    assert out.splitlines()[at:] == [*bad[:20], "... and 5 more bad rows", "report: found.json"]
    report = json.loads(Path("found.json").read_text())
    assert report["bad_rows"] == bad
    assert {one["kind"]: one["count"] for one in report["findings"]} == {
        "bad_row": 25, "overlap": 1, "duplicate": 1, "email": 1,
    }  # fmt: skip
    assert report["findings"][1]["places"] == [{"where": "eval.jsonl:1", "detail": "", "twin": "train.jsonl:4"}]
    assert not Path("data_report.json").exists()


def test_the_exit_code_is_the_worst_severity(write: Write) -> None:
    note = write("note.jsonl", *GOOD, ("Mail?", "a@b.co"))
    warning = write("warning.jsonl", *GOOD, GOOD[0])
    error = write("error.jsonl", *GOOD, "{")
    assert [check(name) for name in (note, warning, error)] == [0, 0, 2]
    assert [check(name, "--strict") for name in (note, warning, error)] == [0, 2, 2]
    both = write("held.jsonl", GOOD[0])
    assert check(note, held_out=both) == 2
    assert check(note, "eval.overlap=allow", "--strict", held_out=both) == 0
    assert check(error, "data.on_bad_row=skip") == 0


def test_no_secret_and_no_escape_code_reaches_the_terminal(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    token = "hf_" + "aB3" * 10
    row = json.dumps({"question": f"use {token}", "answer": "ok"})
    check(write("train.jsonl", *GOOD, row, '{"\\u001b[2J": 1}'))
    said = capsys.readouterr().out + Path("data_report.json").read_text()
    assert "access token" in said
    assert token not in said
    assert "\x1b" not in said


def test_held_out_rows_of_another_format_are_detected(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """As a run reads them: data.format and data.columns are about the training rows."""
    held_out = write(
        "eval.jsonl", '{"messages": [{"role": "user", "content": "a"}, {"role": "model", "content": "b"}]}'
    )
    assert check(write("train.jsonl", *GOOD), "data.format=prompt_completion", held_out=held_out) == 0
    assert "(messages: the rows have messages)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["check", "sft_tiny", "data.train=gone.jsonl"], "gone.jsonl: no such file"),
        (["check", "sft_tiny", "data.trian=x"], "command line: data.trian: unknown key; did you mean 'train'?"),
        (["check", "sft_tiny", "--out", "."], ".: is a folder; give a file with --out"),
        (["check", "sft_tiny", "--out", "no/where.json"],
         "no/where.json: cannot be written: No such file or directory; choose another --out"),
        (["fix", "sft_tiny", "--out", "full"], "full: exists already; choose another --out, or move it away"),
        (["fix", "sft_tiny", "--out", "full/a.txt"],
         "full/a.txt: exists already; choose another --out, or move it away"),
        (["fix", "sft_tiny", "data.train=full", "--out", "full/clean"],
         "full/clean: lies in full, whose files are all read as rows; choose another --out"),
        (["fix", "sft_tiny"],
         "gemma-ft data fix: Missing option '--out'; gemma-ft data fix --help shows what it takes"),
    ],
)  # fmt: skip
def test_misuse(arguments: list[str], line: str, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    Path("full").mkdir()
    write("full/a.txt", "rows")
    assert main(["data", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err == line + "\n"
    assert sorted(path.name for path in Path().rglob("*") if path.is_file()) == ["a.txt"]


def test_without_a_verb_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data"]) == 0
    out = capsys.readouterr().out
    assert "check" in out
    assert "fix" in out


def test_fix_and_then_check(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    train = write("train.jsonl", *GOOD, GOOD[0], "{", ("lost \ufffd", "x"))
    held_out = write("eval.jsonl", GOOD[3])
    Path("clean").mkdir()  # an empty folder may be there
    sides = [f"data.train={train}", f"data.eval={held_out}"]
    assert main(["data", "fix", "sft_tiny", "--out", "clean", *sides]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "train.jsonl: 11 rows -> 7 in clean/train.jsonl",
        "  1 left out: held out as well",
        "  1 left out: repeats another row",
        "  1 left out: U+FFFD",
        "  1 left out: bad row",
        "eval.jsonl: 1 rows -> 1 in clean/eval.jsonl",
        "every change: clean/changes.log",
        "to use them: data.train=clean/train.jsonl data.eval=clean/eval.jsonl",
    ]
    assert sorted(path.name for path in Path().iterdir()) == ["clean", "eval.jsonl", "train.jsonl"]
    assert sorted(path.name for path in Path("clean").iterdir()) == ["changes.log", "eval.jsonl", "train.jsonl"]
    assert len(Path("clean/changes.log").read_text().splitlines()) == 4
    assert check("clean/train.jsonl", "--strict", held_out="clean/eval.jsonl") == 0


def test_a_fix_that_fails_leaves_nothing(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    train = write("train.jsonl", GOOD[0])
    assert main(["data", "fix", "sft_tiny", "--out", "clean", f"data.train={train}", f"data.eval={train}"]) == 2
    assert capsys.readouterr().err == "train.jsonl: no row of it would be left; gemma-ft data check says why\n"
    assert [path.name for path in Path().iterdir()] == ["train.jsonl"]


PAIRS = [
    json.dumps(
        {"prompt": f"Which city is number {n}?", "chosen": f"City {n} it is.", "rejected": f"No idea at all of {n}"}
    )
    for n in range(8)
]


def test_pairs_are_looked_at_for_an_objective_that_compares(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    bad = json.dumps({"prompt": "q", "chosen": "a", "rejected": "a"})
    train = write("train.jsonl", *PAIRS, bad)
    assert check(train, "objective.kind=dpo", held_out=write("eval.jsonl", PAIRS[0])) == 2
    out = capsys.readouterr().out.splitlines()
    at = next(number for number, line in enumerate(out) if line.startswith("train  train.jsonl: 8 rows, "))
    assert out[at].endswith(" trained (preference: the rows have chosen, rejected)")
    assert out[at + 2].startswith("8 pairs; answers, medians: chosen ")
    assert out[at + 3] == (
        "the chosen answer is the longer one in 0% of the pairs, the shorter one in 100%; 0% begin with the same words"
    )
    assert out[-2:] == [
        "train.jsonl:9: 'chosen' and 'rejected' are the same answer", "report: data_report.json",
    ]  # fmt: skip
    report = json.loads(Path("data_report.json").read_text())
    assert {one["kind"]: one["count"] for one in report["findings"]} == {"bad_row": 1, "prompt_overlap": 1}
    assert report["preferences"]["chosen"] == 8


def test_a_fix_for_pairs_parts_training_and_held_out_prompts(write: Write) -> None:
    train, held_out = write("train.jsonl", *PAIRS), write("eval.jsonl", PAIRS[0])
    assert main(["data", "fix", "sft_tiny", f"data.train={train}", f"data.eval={held_out}", "objective.kind=dpo",
                 "--out", "fixed"]) == 0  # fmt: skip
    assert Path("fixed/train.jsonl").read_text().splitlines() == PAIRS[1:]
    assert check("fixed/train.jsonl", "objective.kind=dpo", held_out="fixed/eval.jsonl") == 0


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        (
            {"prompt": "q", "completion": "a", "label": True},
            "dpo",
            "the rows have prompt, completion and a label, and this objective compares two answers to one prompt; set "
            "objective.kind: kto, or give rows with prompt, chosen and rejected",
        ),
        (
            {"prompt": "q", "completion": "a"},
            "kto",
            "the rows have prompt, completion, and nothing that says whether an answer is a good one; give each a "
            "label, true or false, or name its field with data.columns.label",
        ),
    ],
)
@pytest.mark.parametrize("verb", [["data", "check"], ["preview"]], ids=" ".join)
def test_rows_of_another_kind_are_one_line(
    verb: list[str], row: dict[str, object], kind: str, reason: str, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write("train.jsonl", json.dumps(row))
    assert main([*verb, "sft_tiny", f"data.train={train}", "data.eval=null", f"objective.kind={kind}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"train.jsonl: {reason}"
