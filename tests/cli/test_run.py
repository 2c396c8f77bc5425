"""`gemma-ft` as a user starts it: a process of its own, its exit code and what it says."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from gemma_ft.cli.app import main

QUICK = [
    "strategy=lora",
    "data.max_seq_len=128",
    "train.max_steps=2",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "eval.max_rows=4",
    "eval.generate_rows=2",
    "eval.max_new_tokens=4",
    "checkpoint.every_steps=1",
]


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gemma_ft", *arguments]
    return subprocess.Popen(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(arguments: Sequence[str], cwd: Path) -> tuple[int, str, str]:
    process = start(*arguments, cwd=cwd)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def told(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """The same of `main` in this process: what libraries a process begins with is not looked at."""
    capsys.readouterr()
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_run_from_any_directory_then_again_then_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shipped recipes, data and weights are found from elsewhere; nothing but the run is said."""
    code, out, err = run(["train", "recipes/sft_tiny.yaml", "output_dir=out", *QUICK], tmp_path)
    assert (code, err) == (0, "")
    assert "What was learned" in out
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 2
    base = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base).is_absolute()
    monkeypatch.chdir(tmp_path)
    code, _, err = told(["train", "sft_tiny", "output_dir=out", *QUICK], capsys)
    assert code == 2
    assert err == (
        "out: already holds a run; use --resume to go on with it, --overwrite to start again, or another output_dir\n"
    )
    code, out, err = told(["train", "sft_tiny", "output_dir=out", *QUICK, "--resume"], capsys)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "out: already finished, 2 steps; nothing to do"


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    process = start("train", "sft_tiny", "output_dir=out", *QUICK, "train.max_steps=100000", cwd=tmp_path)
    assert process.stdout is not None
    seen = ""
    while not (tmp_path / "out" / "metrics.jsonl").exists():  # bounded: the process ends by itself if it fails
        assert process.poll() is None, seen
        line = process.stdout.readline()
        seen += line
        if "steps" in line:
            break
    while not (tmp_path / "out" / "checkpoints" / "step-00000001").is_dir():
        assert process.poll() is None, seen
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert re.fullmatch(r"stopped by SIGINT after step \d+; --resume goes on from its checkpoint\n", err)
    assert "Traceback" not in out


def test_bad_rows_are_told_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"q{n}", "completion": None if n % 2 else "a"} for n in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    code, _, err = told(["train", "sft_tiny", "data.train=rows.jsonl", "output_dir=out", *QUICK], capsys)
    assert code == 2
    lines = err.splitlines()
    assert lines[0].startswith("rows.jsonl:2: ")
    assert len(lines) == 6
    assert lines[5] == "... and 3 more bad rows"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "sft_tiny", "train.learning_rat=1"], "command line: train.learning_rat: unknown key; did you mean"),
        pytest.param(
            ["train", "sft_tiny", "model.weights=./nowhere"], "model.weights: ./nowhere: no such folder; name a folder",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_user_errors_are_one_line_with_exit_code_2(tmp_path: Path, arguments: list[str], expected: str) -> None:
    code, _, err = run(arguments, tmp_path)
    assert code == 2
    assert err.startswith(expected)
    assert len(err.splitlines()) == 1
