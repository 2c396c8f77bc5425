"""Two answers to one question on a screen: in two columns where there is room, else one below the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

NAMES = ("base", "tuned")
LEAST_WIDTH = 80  # columns of the terminal for two answers beside each other
REFRESH_SECONDS = 0.1

Write = Callable[[str], None]


class Stacked:
    """Answers one below the other, each under its name, written as they come."""

    def __init__(self, write: Write) -> None:
        self._write = write

    def answer(self, name: str) -> Write:
        """What takes the pieces of the answer of `name`."""
        self._write(f"{name}:\n")
        return self._write

    def ended(self, note: str) -> None:
        """The answer has ended; `note` says how, where it did not end by itself."""
        self._write(f" {note}\n" if note else "\n")

    def __enter__(self) -> Stacked:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class SideBySide:
    """Answers in two columns that grow while they come. Pieces are plain text, without terminal control."""

    def __init__(self, console: Console) -> None:
        self._table = Table(expand=True, show_edge=False, highlight=False)
        self._texts = {name: Text() for name in NAMES}
        for name in NAMES:
            self._table.add_column(name, ratio=1, overflow="fold")
        self._table.add_row(*self._texts.values())
        self._live = Live(self._table, console=console, auto_refresh=False)
        self._current = self._texts[NAMES[0]]
        self._shown = 0.0

    def answer(self, name: str) -> Write:
        """What takes the pieces of the answer of `name`."""
        self._current = self._texts[name]
        return self._append

    def ended(self, note: str) -> None:
        """The answer has ended; `note` says how, where it did not end by itself."""
        self._current.append(f" {note}" if note else "", style="dim")
        self._live.refresh()

    def _append(self, piece: str) -> None:
        self._current.append(piece)
        if time.monotonic() - self._shown > REFRESH_SECONDS:
            self._live.refresh()
            self._shown = time.monotonic()

    def __enter__(self) -> SideBySide:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()


def compare_view(console: Console, write: Write) -> Stacked | SideBySide:
    """The view that fits the console: columns in a terminal of LEAST_WIDTH, else through `write`."""
    return SideBySide(console) if console.is_terminal and console.width >= LEAST_WIDTH else Stacked(write)
