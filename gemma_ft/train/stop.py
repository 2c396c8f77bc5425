"""Requests to stop: signals and the stop file. A run that trains ends at the next step, with a checkpoint; before and
after that it ends at once, for there is nothing that a resume would not find.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from gemma_ft.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """What asked this process to stop, if anything did. `file`: a path whose appearance asks for it."""

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self.reason: str | None = None
        self._waits = False

    def asked(self) -> bool:
        """Whether a signal or the stop file has asked."""
        if self.reason is None and self.file is not None and self.file.exists():
            self.reason = f"{self.file} is there"
        return self.reason is not None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM, SIGINT and SIGUSR1 while this is open. A second one leaves at once."""
        if threading.current_thread() is not threading.main_thread():  # only there can a signal be taken
            yield
            return
        before = {number: signal.signal(number, self._take) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While this is open a signal is only noted, for whoever asks at the next step."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def _take(self, number: int, _: FrameType | None) -> Any:
        if self.reason is not None:
            os._exit(Stopped.exit_code)
        self.reason = signal.Signals(number).name
        if not self._waits:
            raise Stopped(f"stopped by {self.reason}; nothing was lost, --resume goes on")
