"""The observer of a terminal: lines, and bars under them; where there is no terminal, lines alone. The one place where
a bar is set up.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from gemma_ft.system.units import byte_size, number, percent
from gemma_ft.ui.guarded_output import guarded
from gemma_ft.ui.stderr import tell

LINES_WITHOUT_TERMINAL = 20
STEPS = "  {what} {done}/{total}  {figures}"  # lines of a training run, and of a file of answers
COUNTED = {"train": "step"}  # job -> what is done in it, where that is another word
SELDOM = ("held-out batches", "held-out answers")  # told without a terminal only where they take long
PATIENCE = 15.0  # seconds
ANSWERS = "  {done}/{total} answers  {figures}"
SHOWN: Mapping[str, Callable[[Any], str]] = {
    "loss": lambda value: f"loss {number(value)}",
    "eval_loss": lambda value: f"eval {value:.4f}",
    "rewards/margins": lambda value: f"margin {number(value, 3)}",
    "rewards/accuracies": lambda value: f"accuracy {percent(value)}",
    "rewards/chosen": lambda value: f"good {number(value, 3)}",
    "rewards/rejected": lambda value: f"bad {number(value, 3)}",
    "kl": lambda value: f"kl {number(value, 3)}",
    "entropy": lambda value: f"entropy {number(value, 3)}",
    "tokens_per_second": lambda value: f"{value:,.0f} tok/s",
    "peak_bytes": byte_size,
}


def say(console: Console, text: str) -> None:
    """A line as it is: no markup, no colours, not broken."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class ConsoleObserver:
    """Writes to one console. `line`: how a counted job is told where there is no terminal, some twenty times, as a
    format of what, done, total and figures; None: it is not. `stays`: bars are left on the screen when their job is
    done.
    """

    def __init__(self, console: Console, *, line: str | None = None, stays: bool = False) -> None:
        self.console, self._line, self._stays = console, line, stays
        self._bars: Progress | None = None

    def say(self, text: str) -> None:
        """One line, above the bars when there are any."""
        say(self.console, text)

    def warn(self, text: str) -> None:
        """One line on stderr, past everything that may hold it up."""
        tell(text)

    @contextlib.contextmanager
    def job(self, what: str, total: int | None = None, *, done: int = 0) -> Iterator[_Job]:
        """A bar for a job, or a count where nobody knows how much there is; with those of jobs that go on already."""
        outermost = self._bars is None
        if self._bars is None:
            self._bars = _bars(self.console, counted=total is not None, transient=total is None or not self._stays)
            self._bars.start()
        try:
            task = self._bars.add_task(what, total=total, completed=done, figures="")
            yield _Job(self, self._bars, task, self._line if total is not None else None, COUNTED.get(what, what))
        finally:
            if outermost:
                self._bars.stop()
                self._bars = None

    def heard(self, on_gone: Callable[[], None]) -> AbstractContextManager[None]:
        """The console writes behind a guard meanwhile."""
        return guarded(self.console, on_gone)


class _Job:
    """One bar."""

    def __init__(self, observer: ConsoleObserver, bars: Progress, task: TaskID, line: str | None, what: str) -> None:
        self._observer, self._bars, self._task, self._line, self._what = observer, bars, task, line, what
        self._begun, self._tokens = time.monotonic(), 0.0
        self._last = self._begun if what in SELDOM else None  # when a line was told, of what is told seldom

    def advance(self, count: int = 1, /, **figures: float | None) -> None:
        """Moves the bar, and says beside it what the figures are."""
        text = self._figures(figures)
        self._bars.update(self._task, advance=count, figures=text)
        if self._line is not None and not self._observer.console.is_terminal:
            task = self._bars.tasks[self._task]
            done, total = int(task.completed), int(task.total or 0)
            if self._is_due(done, total):
                self._observer.say(self._line.format(what=self._what, done=done, total=total, figures=text).rstrip())

    def _is_due(self, done: int, total: int) -> bool:
        """Whether a line is told where there is no terminal."""
        if self._last is None:
            return done == total or done % max(1, total // LINES_WITHOUT_TERMINAL) == 0
        now = time.monotonic()
        due = now - self._last >= PATIENCE
        self._last = now if due else self._last
        return due

    def phase(self, text: str) -> None:
        """The name of the bar, or a line where there is none."""
        if self._observer.console.is_terminal:
            self._bars.update(self._task, description=text)
        else:
            self._observer.say(f"  {text}")

    def _figures(self, figures: Mapping[str, float | None]) -> str:
        shown = [SHOWN[name](value) for name, value in figures.items() if name != "tokens"]
        if "tokens" in figures:
            self._tokens += figures["tokens"] or 0
            seconds = time.monotonic() - self._begun
            shown += [SHOWN["tokens_per_second"](self._tokens / seconds)] if seconds else []
        return "  ".join(shown)


def _bars(console: Console, *, counted: bool, transient: bool) -> Progress:
    columns: list[ProgressColumn] = [TextColumn("{task.completed:,} {task.description}"), TimeElapsedColumn()]
    if counted:
        columns = [
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=False)),  # folds in a narrow window
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TextColumn("eta"),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
        ]
    return Progress(*columns, console=console, transient=transient, disable=not console.is_terminal)
