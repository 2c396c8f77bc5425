"""Requests to stop: signals, the stop file, an output that nobody reads. A run that trains ends at the next step, with
a checkpoint; before and after that it ends at once, for there is nothing that a resume would not find.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from gemma_ft.errors import Stopped
from gemma_ft.system.environment import hangup

ECHO_SECONDS = 2.0  # in which a further signal is taken to be the first one again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # and SIGHUP, unless it was ignored at the start


class StopNow(BaseException):
    """A signal came where nothing has to be kept; not an Exception, for libraries and we ourselves catch those."""


class StopRequest:
    """What asked this process to stop, if anything did. `file`: a path whose appearance asks for it."""

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self.reason: str | None = None
        self._waits = False
        self._since: float | None = None  # when the first signal came

    def asked(self) -> bool:
        """Whether a signal or the stop file has asked."""
        if self.reason is None and self.file is not None and self.file.exists():
            self.reason = f"{self.file} is there"
        return self.reason is not None

    @property
    def signalled(self) -> bool:
        """Whether a signal has asked."""
        return self._since is not None

    def ask(self, reason: str) -> None:
        """Ask for the end after this step, for a reason that is no signal; any thread may."""
        if self.reason is None:
            self.reason = reason

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals while this is open. A second one leaves at once."""
        if threading.current_thread() is not threading.main_thread():  # only there can a signal be taken
            yield
            return
        before = {number: signal.signal(number, self._take) for number in (*SIGNALS, *hangup())}
        try:
            yield
        finally:
            for number, handler in before.items():
                late = number == signal.SIGHUP and self.reason == number.name  # a second one could say nothing new
                signal.signal(number, signal.SIG_IGN if late else handler)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While this is open a signal is only noted, for whoever asks at the next step."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def _take(self, number: int, _: FrameType | None) -> Any:
        if self._since is not None:
            # a launcher hands on what its ranks were sent as well; of a terminal several send SIGHUP, each when it ends
            if number == signal.SIGHUP or time.monotonic() - self._since < ECHO_SECONDS:
                return
            os._exit(Stopped.exit_code)
        self._since = time.monotonic()
        self.ask(signal.Signals(number).name)
        if not self._waits:
            raise StopNow
