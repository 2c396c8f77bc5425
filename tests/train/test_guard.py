"""Whoever only hears of a run can neither stop it, nor hang it, nor end it: sinks that block, raise, or are gone."""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gemma_ft.cli.app import main
from gemma_ft.errors import Stopped
from gemma_ft.recipe.load import LoadedRecipe
from gemma_ft.system import environment
from gemma_ft.train.guard import Guard
from gemma_ft.train.signals import StopNow, StopRequest
from gemma_ft.ui.training import train_and_show
from tests.observed import Sink

RecipeFor = Callable[..., LoadedRecipe]
Train = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What a sink waits for; open at the end, whatever happens."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture(autouse=True)
def _hangup_as_before() -> Iterator[None]:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_sink_that_blocks_costs_nothing_but_what_finds_no_room(gate: threading.Event) -> None:
    done: list[int] = []
    entered = threading.Event()
    guard = Guard("test", lambda error: None, room=2)
    assert guard.post(lambda: (entered.set(), gate.wait(), done.append(0)))  # type: ignore[func-returns-value]
    assert entered.wait(30)
    assert [guard.post(lambda n=n: done.append(n)) for n in (1, 2, 3)] == [True, True, False]  # type: ignore[misc]
    assert not guard.close(0.001)
    gate.set()
    assert guard.close(30)
    assert done == [0, 1, 2]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), ValueError("closed"), SystemExit(1)])
def test_the_first_fault_of_a_sink_is_its_last(error: BaseException) -> None:
    faults: list[BaseException] = []
    guard, calls = Guard("test", faults.append, room=2), []

    def fail() -> None:
        calls.append("made")
        raise error

    for _ in range(9):
        guard.post(fail)
    assert guard.close(30)
    assert (calls, faults) == (["made"], [error])
    assert Guard("unused", faults.append).close(0)


def test_a_hangup_is_a_request_and_more_of_them_are_none() -> None:
    """A terminal's end is told by the kernel, the shell and whatever it ran in: SIGHUP several times."""
    stop = StopRequest()
    with stop.listening():
        with stop.waiting():
            signal.raise_signal(signal.SIGHUP)
            stop._since = -1e9  # long ago
            signal.raise_signal(signal.SIGHUP)
        assert (stop.reason, stop.signalled, stop.asked()) == ("SIGHUP", True, True)
    signal.raise_signal(signal.SIGHUP)  # while the last line is told


def test_where_nothing_has_to_be_kept_a_hangup_ends_at_once() -> None:
    stop = StopRequest()
    with pytest.raises(StopNow), stop.listening():
        signal.raise_signal(signal.SIGHUP)


def test_nohup_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    """POSIX nohup: SIGHUP is ignored, and inherited so; the launcher must not take it up for the ranks either."""
    monkeypatch.delenv("PET_SIGNALS_TO_HANDLE", raising=False)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest()
    with stop.listening():
        signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert (stop.reason, stop.signalled) == (None, False)
    environment.pass_signals_on()
    assert os.environ["PET_SIGNALS_TO_HANDLE"] == "SIGTERM,SIGINT,SIGQUIT,SIGUSR1"
    monkeypatch.delenv("PET_SIGNALS_TO_HANDLE")
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    environment.pass_signals_on()
    assert os.environ["PET_SIGNALS_TO_HANDLE"] == "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    monkeypatch.delenv("PET_SIGNALS_TO_HANDLE")


def test_a_first_signal_after_another_reason_is_a_first_signal(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    for stop in (StopRequest(), StopRequest(tmp_path / "stop")):
        stop.ask("a closed output") if stop.file is None else stop.asked()
        reason = stop.reason
        with stop.listening(), stop.waiting():
            signal.raise_signal(signal.SIGTERM)  # a second one would end this process
        assert (stop.reason, stop.signalled) == (reason, True)


def test_the_last_word_finds_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stream:
        monkeypatch.setattr("sys.stderr", stream)
        assert main(["train", "no-such-recipe"]) == 2
        stream.write("more\n")
        stream.flush()  # as Python does at its end


def test_a_run_whose_terminal_goes_away_ends_with_a_checkpoint(
    recipe_for: RecipeFor, train: Train, tmp_path: Path
) -> None:
    """As an ssh session ends: SIGHUP, and whatever is written after it fails with EIO."""
    dead: list[bool] = []

    def before(text: str) -> None:
        if "step 2/" in text and not dead:
            dead.append(True)
            signal.raise_signal(signal.SIGHUP)
        if dead:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    loaded = recipe_for("strategy=lora", "train.max_steps=40", "train.schedule=constant", "logging.tensorboard=true")
    with pytest.raises(Stopped) as stopped:
        train_and_show(loaded, console=Console(file=Sink(before), width=120))
    assert stopped.value.exit_code == 143
    found = re.fullmatch(
        r"stopped by (?:SIGHUP|a closed output) after step (\d+); --resume goes on from its checkpoint",
        str(stopped.value),
    )
    assert found is not None, stopped.value
    step = int(found[1])
    root = tmp_path / "run"
    assert [path.name for path in (root / "checkpoints").iterdir()] == [f"step-{step:08}"]
    ends = recipe_for("strategy=lora", f"train.max_steps={step + 1}", "train.schedule=constant")
    assert [line["step"] for line in train(ends, resume=True)] == list(range(1, step + 2))


def test_a_run_whose_output_is_closed_ends_with_a_checkpoint(recipe_for: RecipeFor, tmp_path: Path) -> None:
    """As `gemma-ft train ... | head -1` does; rich 15 would end the process with exit code 1 and no word."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stream, pytest.raises(Stopped) as stopped:
        train_and_show(recipe_for("strategy=lora", "train.max_steps=40"), console=Console(file=stream, width=120))
    assert str(stopped.value) == "stopped by a closed output after step 1; --resume goes on from its checkpoint"
    assert (tmp_path / "run/checkpoints/step-00000001").is_dir()
