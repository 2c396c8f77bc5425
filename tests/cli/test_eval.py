"""`gemma-ft eval` as a user starts it: results on stdout, notes on stderr, one line for a fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemma_ft.cli.app import main


def test_a_bare_recipe_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", "sft_tiny", "strategy=lora", f"output_dir={tmp_path / 'no'}", "--rows", "2", "--out", "e.json"]
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "held out: data/scheduling_eval.jsonl: 2 rows scored, 2 answered", "  base: loss", "  base: answers"
    ]  # fmt: skip
    assert captured.out.startswith("Held-out rows and tasks")
    assert captured.out.endswith("results: e.json\n")
    results = json.loads((tmp_path / "e.json").read_text())
    assert (list(results["models"]), results["source"]) == (["base"], "sft_tiny")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["eval"], "gemma-ft eval: Missing argument 'RECIPE_OR_RUN'; gemma-ft eval --help shows what it takes"),
        (["eval", "sft_tiny", "--models", "adapter"], "--models: there is no 'adapter' here; there are base"),
        (["eval", "sft_tiny", "--models", ""],
         "--models: names nothing; give names with commas between them, or leave it out"),
        (["eval", "sft_tiny", "--metrics", " ,"],
         "--metrics: names nothing; give names with commas between them, or leave it out"),
        (["eval", "sft_tiny", "--window", "9999"],
         "--window: expected 3 to 2048 tokens, the context of the model, got 9999"),
        (["eval", "sft_tiny", "--tasks", "x", "--task-path", "nowhere"],
         "--task-path: nowhere: no such folder; give one that holds task files (.yaml)"),
        (["eval", "sft_tiny", "--metrics", "accuracy"],
         "--metrics: unknown metric 'accuracy'; known are exact_match, numeric_match, numeric_flexible, json_valid, "
         "json_equal, rouge1, rougeL, chrf, bleu, token_f1"),
    ],
)  # fmt: skip
def test_a_fault_is_one_line(
    arguments: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", line + "\n")


def test_tasks_of_the_harness_stand_in_the_same_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="the harness is an extra: pip install 'gemma-ft[eval]'")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"question": f"Day {n}", "choices": ["A", "B"], "gold": n % 2}) + "\n" for n in range(6))
    )
    task = {
        "task": "days",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "days.yaml").write_text(json.dumps(task))
    recipe = ["sft_tiny", f"output_dir={tmp_path / 'no'}", "strategy=lora", "eval.generate_rows=0", "eval.max_rows=1"]
    arguments = ["eval", *recipe, "--tasks", "days", "--task-path", ".", "--task-limit", "4", "--out", "e.json"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "held out: data/scheduling_eval.jsonl: 1 rows scored, 0 answered",
        "  no answers are generated: eval.generate_rows is 0; --rows N asks for some",
        "  base: loss",
        "  base: tasks",
    ]
    assert "days: acc" in captured.out
    found = json.loads((tmp_path / "e.json").read_text())["tasks"]["base"]["days"]["acc"]
    assert found["rows"] == 4
    assert found["low"] <= found["value"] <= found["high"]
