"""`gemma-ft report` as a user calls it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_ft.cli.app import main
from tests.ui.test_report import make_run


def test_one_run_gets_its_page_several_are_compared(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        make_run(finished_run, Path(), name=name)
    assert main(["report", "one"]) == 0
    assert main(["report", "one", "two"]) == 0
    assert main(["report", "one", "two", "--out", "pages/both.html"]) == 0
    assert main(["report", "two", "--out", "two.html"]) == 0
    assert capsys.readouterr().out == "one/report.html\ncomparison.html\npages/both.html\ntwo.html\n"
    assert "<title>Run one</title>" in Path("one/report.html").read_text()
    assert Path("comparison.html").read_bytes() == Path("pages/both.html").read_bytes()
    assert not Path("two/report.html").exists()
    assert main(["report", "one"]) == 0  # again, over the old one


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == (
        f"{tmp_path}/nowhere: holds no run: no recipe.yaml in it; name the output_dir of a training run\n"
    )
