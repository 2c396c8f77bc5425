"""How far a file of answers is: a bar in a terminal, a few plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINES_WITHOUT_TERMINAL = 20


class AnswerProgress:
    """Shows on `console` how many of `total` rows are answered, and how many tokens a second are made."""

    def __init__(self, console: Console, *, total: int, done: int) -> None:
        self.console, self.total, self.done = console, total, done
        self._tokens = 0
        self._bar = Progress(
            TextColumn("answers"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("answers", total=total, completed=done, speed="")

    def answered(self, tokens: int) -> None:
        """One more row is answered, with so many tokens."""
        self.done += 1
        self._tokens += tokens
        seconds = self._bar.tasks[0].elapsed or 0.0
        speed = f"{self._tokens / seconds:,.0f} tok/s" if seconds else ""
        self._bar.update(self._task, completed=self.done, speed=speed)
        every = max(1, self.total // LINES_WITHOUT_TERMINAL)
        if not self.console.is_terminal and (self.done % every == 0 or self.done == self.total):
            self.console.print(f"  {self.done}/{self.total} answers  {speed}".rstrip(), markup=False, highlight=False)

    def __enter__(self) -> AnswerProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
