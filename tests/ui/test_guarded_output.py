"""A console that blocks, breaks or is gone costs whoever writes to it nothing."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from gemma_ft.ui.guarded_output import GuardedOutput, guarded
from tests.observed import Sink


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What a sink waits for; open at the end, whatever happens."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, None])
def test_an_output_that_nobody_reads_is_told_once(number: int | None) -> None:
    def fail(_: str) -> None:
        raise OSError(number, "gone") if number else ValueError("I/O operation on closed file.")

    gone: list[bool] = []
    console = Console(file=Sink(fail), width=80)
    with guarded(console, lambda: gone.append(True)):
        for _ in range(3):
            console.print("a line")
        with Progress(console=console) as bar:
            bar.add_task("train")
    assert gone == [True]


def test_a_pipe_without_a_reader(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    gone: list[bool] = []
    with open(writer, "w", encoding="utf-8") as stream:
        console = Console(file=stream, width=80)
        with guarded(console, lambda: gone.append(True)):
            console.print("seen")
        assert os.read(reader, 100) == b"seen\n"
        os.close(reader)
        with guarded(console, lambda: gone.append(True)):
            console.print("not seen")
    assert gone == [True]


def test_a_full_disk_behind_an_output_may_pass() -> None:
    full = [errno.ENOSPC, errno.EDQUOT]

    def fail(_: str) -> None:
        if full:
            raise OSError(full.pop(), "full")

    gone: list[bool] = []
    sink = Sink(fail)
    console = Console(file=sink, width=80)
    with guarded(console, lambda: gone.append(True)):
        for text in ("one", "two", "three"):
            console.print(text)
    assert (sink.getvalue(), gone) == ("three\n", [])


def test_a_terminal_that_is_stopped_says_what_it_did_not_show(gate: threading.Event) -> None:
    entered = threading.Event()
    sink = Sink(lambda text: (entered.set(), gate.wait(), None)[-1])
    output = GuardedOutput(sink, lambda: None, room=1)
    output.write("first\n")
    assert entered.wait(30)
    for text in ("waits\n", "lost\n", "lost, too\n"):
        output.write(text)
    assert not output.finish(0.001)
    gate.set()
    assert output.finish(30)
    again = GuardedOutput(sink, lambda: None, room=2)
    again._left_out = 2
    again.write("last\n")
    assert again.finish(30)
    assert sink.getvalue() == "first\nwaits\n(2 lines were left out)\nlast\n"


def test_what_a_console_asks_of_its_file_is_answered(tmp_path: Path) -> None:
    with (tmp_path / "out.txt").open("w", encoding="latin-1") as stream:
        output = GuardedOutput(stream, lambda: None)
        assert (output.isatty(), output.encoding, output.fileno()) == (False, "latin-1", stream.fileno())
        assert output.writable()
        output.write("é \u2713\n")
        assert output.finish(30)
    assert (tmp_path / "out.txt").read_bytes() == b"\xe9 ?\n"
