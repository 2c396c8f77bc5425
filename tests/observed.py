"""Those who hear of work, as a test wants them: an observer that remembers, a stream that is acted upon."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any


class Observed:
    """Observer and job in one. `on_advance` is given the figures of each step that is done."""

    def __init__(self, on_advance: Callable[[dict[str, Any]], object] = lambda figures: None) -> None:
        self.lines: list[str] = []
        self.jobs: list[tuple[str, int | None, int]] = []
        self.counts: list[int] = []
        self._on_advance = on_advance

    def say(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.lines.append(text)

    def job(self, what: str, total: int | None = None, *, done: int = 0) -> AbstractContextManager[Observed]:
        self.jobs.append((what, total, done))
        return contextlib.nullcontext(self)

    def heard(self, on_gone: Callable[[], None]) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def advance(self, count: int = 1, /, **figures: float | None) -> None:
        self.counts.append(count)
        self._on_advance(figures)

    def phase(self, text: str) -> None:
        self.lines.append(text)


class Sink(io.StringIO):
    """A stream whose writes a test decides on, each before it is made."""

    def __init__(self, before: Callable[[str], None]) -> None:
        super().__init__()
        self._before = before

    def write(self, text: str) -> int:
        self._before(text)
        return super().write(text)
