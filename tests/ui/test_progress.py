"""The observer of a console: the same words with a terminal and without, one set of bars, nothing left behind."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import pytest
from rich.console import Console

from gemma_ft.system.observer import Observer
from gemma_ft.ui.progress import ANSWERS, STEPS, ConsoleObserver
from gemma_ft.ui.stderr import StderrObserver
from tests.observed import Sink

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, force_interactive=terminal, width=100)


def shown(one: Console) -> str:
    assert isinstance(one.file, io.StringIO)
    return one.file.getvalue()


def test_without_a_terminal_a_run_is_told_twenty_times_and_at_its_end() -> None:
    out = console(terminal=False)
    observer: Observer = ConsoleObserver(out, line=STEPS, stays=True)
    with observer.job("documents read") as rows:
        rows.advance(108)
    with observer.job("train", 43, done=2) as job:
        for _ in range(41):
            job.advance(loss=0.5, tokens_per_second=1234.6, peak_bytes=2**30)
    lines = shown(out).splitlines()
    assert lines[0] == "  step 4/43  loss 0.5000  1,235 tok/s  1.00 GiB"
    assert [int(line.split()[1].partition("/")[0]) for line in lines] == [*range(4, 43, 2), 43]


def test_what_is_counted_before_the_steps_has_its_own_name() -> None:
    out = console(terminal=False)
    observer = ConsoleObserver(out, line=STEPS, stays=True)
    with observer.job("reference answers", 40) as job:
        job.advance(8)
        job.advance(32)
    with observer.job("train", 1) as job:
        job.advance(loss=0.5)
    assert shown(out).splitlines() == [
        "  reference answers 8/40",
        "  reference answers 40/40",
        "  step 1/1  loss 0.5000",
    ]


def test_figures_that_are_not_there_are_left_out_or_a_dash() -> None:
    out = console(terminal=False)
    with ConsoleObserver(out, line=STEPS).job("train", 2) as job:
        job.advance(loss=None, eval_loss=2.0, tokens_per_second=9.0, peak_bytes=0)
        job.advance()
    assert shown(out).splitlines() == ["  step 1/2  loss –  eval 2.0000  9 tok/s  0.00 GiB", "  step 2/2"]


def test_figures_of_preferences_stand_beside_the_loss() -> None:
    out = console(terminal=False)
    with ConsoleObserver(out, line=STEPS).job("train", 2) as job:
        job.advance(loss=0.5, **{"rewards/margins": 1.25, "rewards/accuracies": 0.875}, tokens_per_second=9.0)
        job.advance(loss=0.25, **{"rewards/chosen": 0.5, "rewards/rejected": None}, tokens_per_second=9.0)
    assert shown(out).splitlines() == [
        "  step 1/2  loss 0.5000  margin 1.250  accuracy 87.5%  9 tok/s",
        "  step 2/2  loss 0.2500  good 0.500  bad –  9 tok/s",
    ]


def test_answers_are_told_with_their_speed_over_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 101.0, 104.0])
    monkeypatch.setattr("gemma_ft.ui.progress.time.monotonic", lambda: next(now))
    out = console(terminal=False)
    with ConsoleObserver(out, line=ANSWERS, stays=True).job("answers", 3, done=1) as job:
        job.advance(tokens=10)
        job.advance(tokens=30)
    assert shown(out).splitlines() == ["  2/3 answers  10 tok/s", "  3/3 answers  10 tok/s"]


@pytest.mark.parametrize("width", [80, 110, 160])
def test_a_narrow_terminal_folds_the_figures_and_hides_no_count(width: int) -> None:
    out = Console(file=io.StringIO(), force_terminal=True, width=width)
    observer = ConsoleObserver(out, line=STEPS, stays=True)
    with observer.job("train", 300) as job:
        job.advance(loss=0.6931, eval_loss=0.7, **{"rewards/margins": 0.1, "rewards/accuracies": 1.0, "kl": -12.3},
                    entropy=0.03, tokens_per_second=5532.0, peak_bytes=0)  # fmt: skip
    text = " ".join(ESCAPES.sub("", shown(out)).split())
    for told in ("1/300", "loss 0.6931", "entropy 0.030", "5,532", "eta"):
        assert told in text
    assert "…" not in text


def test_scoring_is_told_without_a_terminal_where_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 101.0, 116.0, 117.0, 140.0])
    monkeypatch.setattr("gemma_ft.ui.progress.time.monotonic", lambda: next(now))
    out = console(terminal=False)
    with ConsoleObserver(out, line=STEPS, stays=True).job("held-out batches", 4) as job:
        for _ in range(4):
            job.advance()
    assert shown(out).splitlines() == ["  held-out batches 2/4", "  held-out batches 4/4"]


def test_without_a_terminal_other_work_says_its_phases_alone() -> None:
    out = console(terminal=False)
    observer = ConsoleObserver(out)
    with observer.job("loading", 2) as job, observer.job("rows looked at") as rows:
        job.phase("base: loss")
        rows.advance(5)
        job.advance(2)
        observer.say("[not markup] " + "x" * 200)
    assert shown(out) == "  base: loss\n[not markup] " + "x" * 200 + "\n"


def test_on_a_terminal_jobs_share_their_bars_and_leave_nothing() -> None:
    out = console(terminal=True)
    observer = ConsoleObserver(out)
    with observer.job("merge", 4) as merge, observer.job("compare", 2) as compare:
        merge.advance(3)
        compare.phase("comparing")
        observer.say("a line")
        compare.advance()
        assert observer._bars is not None
        observer._bars.refresh()
        text = ESCAPES.sub("", shown(out))
        assert re.search(r"merge\s+━+.*3/4", text)
        assert re.search(r"comparing\s+━+.*1/2", text)
        assert "a line" in text
    assert observer._bars is None
    assert shown(out).endswith(("\x1b[2K", "\x1b[1A\x1b[2K"))  # the bars' lines are cleared


def test_on_a_terminal_a_run_keeps_its_bar_and_rows_are_counted() -> None:
    out = console(terminal=True)
    observer = ConsoleObserver(out, line=STEPS, stays=True)
    with observer.job("documents read") as rows:
        rows.advance(1234)
        assert observer._bars is not None
        observer._bars.refresh()
        assert "1,234 documents read" in ESCAPES.sub("", shown(out))
    with observer.job("train", 2, done=1) as job:
        job.advance(loss=1.0)
    last = ESCAPES.sub("", shown(out)).splitlines()[-1]
    assert "2/2 loss 1.0000" in last
    assert "step" not in last


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_end_with_what_fails(terminal: bool) -> None:
    observer = ConsoleObserver(console(terminal=terminal))
    with pytest.raises(ZeroDivisionError), observer.job("work", 1):
        raise ZeroDivisionError
    assert observer._bars is None


@pytest.mark.parametrize("make", [StderrObserver, lambda: ConsoleObserver(console(terminal=False))])
def test_a_warning_goes_to_stderr_whatever_becomes_of_it(
    make: Callable[[], Observer], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make().warn("the job ends")
    assert capsys.readouterr() == ("", "the job ends\n")

    def gone(text: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("sys.stderr", Sink(gone))
    make().warn("the job ends")


def test_a_server_tells_lines_and_no_bars(capsys: pytest.CaptureFixture[str]) -> None:
    observer: Observer = StderrObserver()
    with observer.heard(lambda: None), observer.job("work", 3) as job:
        job.advance(3)
        observer.say("a line")
    assert capsys.readouterr() == ("", "a line\n")
