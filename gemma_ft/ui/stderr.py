"""The observer of a process that others look after: lines on stderr, one after the other, no bars."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

from gemma_ft.system.observer import SILENT, Job


def tell(text: str) -> None:
    """Write a line at once; a terminal that is gone keeps nobody here."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


class StderrObserver:
    """Has no state: any thread may call it."""

    def say(self, text: str) -> None:
        """A line."""
        tell(text)

    def warn(self, text: str) -> None:
        """A line like any other."""
        tell(text)

    def job(self, what: str, total: int | None = None, *, done: int = 0) -> AbstractContextManager[Job]:
        """Nothing is shown of it."""
        return SILENT.job(what, total, done=done)

    def heard(self, on_gone: Callable[[], None]) -> AbstractContextManager[None]:
        """A line that cannot be written is left out; nobody is told."""
        return SILENT.heard(on_gone)
