"""`gemma-ft export` as a user meets it: what is said, exit codes, and what lies there afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_ft.cli.app import main
from tests.export.tuned import TINY, names_in


def test_a_dry_run_then_the_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", TINY, "--to", "gguf", "--out", str(tmp_path / "tiny"), "--gguf-type", "q8_0"]
    assert main([*arguments, "--push", "me/tiny", "--dry-run"]) == 0
    lines, error = capsys.readouterr()
    assert error == ""
    assert lines.splitlines()[:3] == [
        f"export {TINY} to {tmp_path}/tiny, dry run: nothing is written or sent",
        "1. convert gemma-tiny as q8_0",
        "         1.9 MB  tiny-q8_0.gguf",
    ]
    assert lines.splitlines()[-1] == "3. upload 3 files, 1.9 MB, to me/tiny (private)"
    assert names_in(tmp_path) == []
    assert main(arguments) == 0
    out, error = capsys.readouterr()
    assert error == ""
    assert out.splitlines()[0] == f"{tmp_path}/tiny: 3 files, 1.9 MB"
    assert names_in(tmp_path / "tiny") == ["Modelfile", "README.md", "tiny-q8_0.gguf"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--to", "onnx"], "gemma-ft export: Invalid value for '--to': Value error, 'onnx' is not one of 'hf', "
         "'adapter', 'gguf'; gemma-ft export --help shows what it takes"),
        (["--to", "hf", "--public"], "--public: goes with --push OWNER/NAME"),
        (["--to", "hf", "--push", "it"], "--push it: expected OWNER/NAME of letters, digits, '-', '_' and '.'"),
        (["--to", "adapter"], f"{TINY}: is a whole model without an adapter; use --to hf"),
    ],
)  # fmt: skip
def test_misuse_is_one_line_and_exit_code_2(
    arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", TINY, "--out", str(tmp_path / "out"), *arguments]) == 2
    assert capsys.readouterr() == ("", line + "\n")
    assert names_in(tmp_path) == []


def test_no_such_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", f"{tmp_path}/run", "--to", "hf", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{tmp_path}/run: no such folder; ")
    assert len(error.splitlines()) == 1
