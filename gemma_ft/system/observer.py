"""Who is told of the work while it goes: rooms call it, `ui` shows it. What came of the work is returned, not told."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol


class Job(Protocol):
    """A piece of work whose steps are counted."""

    def advance(self, count: int = 1, /, **figures: float | None) -> None:
        """So many more steps are done. figures: `loss`, `eval_loss`, `tokens_per_second`, `peak_bytes` as they are now,
        `tokens`: made in these steps.
        """

    def phase(self, text: str) -> None:
        """What is being done now."""


class Observer(Protocol):
    """Is told of the work; no answer of it changes a result. Lines may come from any thread."""

    def say(self, text: str) -> None:
        """A line about the work."""

    def warn(self, text: str) -> None:
        """A line for whoever looks after the process, at once: it may end with this call."""

    def job(self, what: str, total: int | None = None, *, done: int = 0) -> AbstractContextManager[Job]:
        """A piece of work that begins after `done` of `total` steps (None: nobody knows how many), to its end."""

    def heard(self, on_gone: Callable[[], None]) -> AbstractContextManager[None]:
        """While this is open, whoever reads what is told can neither hang nor end the work; `on_gone()`: nobody does
        any more.
        """


class Silent:
    """Observer and job in one, of work that nobody watches."""

    def say(self, text: str) -> None:
        """Nothing is shown."""

    def warn(self, text: str) -> None:
        """Nothing is shown."""

    def advance(self, count: int = 1, /, **figures: float | None) -> None:
        """Nothing is shown."""

    def phase(self, text: str) -> None:
        """Nothing is shown."""

    def job(self, what: str, total: int | None = None, *, done: int = 0) -> AbstractContextManager[Job]:
        """One that nobody watches either."""
        return contextlib.nullcontext(self)

    def heard(self, on_gone: Callable[[], None]) -> AbstractContextManager[None]:
        """There is nobody who could leave."""
        return contextlib.nullcontext()


SILENT = Silent()


@contextlib.contextmanager
def callbacks(observer: Observer) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Gives what makes an `on_progress(done, total)` out of a job's name. Each job is there from its first step to the
    end of the context.
    """
    with contextlib.ExitStack() as jobs:

        def make(what: str) -> Callable[[int, int], None]:
            before = 0
            job: Job | None = None

            def on_progress(done: int, total: int) -> None:
                nonlocal before, job
                job = jobs.enter_context(observer.job(what, total)) if job is None else job
                job.advance(done - before)
                before = done

            return on_progress

        yield make
