"""A watch over the other ranks: one that has stopped, or is gone, ends the job within seconds instead of after the
timeout of a collective.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

BEAT_SECONDS = 1.0
GRACE_SECONDS = 10.0  # for a rank to come to where it hears of a fault, before it is taken to wait for the faulty one
SILENT_SECONDS = 20.0  # longer than any call of ours keeps the interpreter's lock
EXIT_CODE = 1


class Heartbeat:
    """A thread that beats for this rank and listens for all others, over the launcher's store.

    `phase`: what this rank is doing, and so the others, for they go step by step with it. `warn` is told why it ends.
    """

    def __init__(self, store: Any, rank: int, size: int, warn: Callable[[str], None]) -> None:
        self.phase = "start"
        self._store = dist.PrefixStore("beat", store.clone())  # type: ignore[attr-defined]
        self._rank, self._size, self._warn = rank, size, warn
        self._stopped = threading.Event()
        self._faults: dict[int, float] = {}  # rank -> since when its fault is known
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Begin; every rank is expected to have begun within SILENT_SECONDS."""
        self._thread.start()

    def tell(self, fault: str | None) -> None:
        """Let the others know why this rank does not come to where they may be waiting for it; None: it is over."""
        with contextlib.suppress(RuntimeError):  # the store is gone: they will find out
            self._store.set(f"fault{self._rank}", fault or "")

    def stop(self) -> None:
        """End: from here on this rank may go, and be missed by nobody."""
        self._stopped.set()

    def _run(self) -> None:
        count, seen = 0, dict.fromkeys(range(self._size), (b"", time.monotonic()))
        while not self._stopped.wait(BEAT_SECONDS):
            count += 1
            try:
                self._store.set(str(self._rank), str(count))
                for other in range(self._size):
                    if other != self._rank:
                        self._look(other, seen)
            except Exception:  # the store is gone, and with it the launcher or rank 0's machine
                if not self._stopped.is_set():
                    self._end("the launcher cannot be reached any more")
        try:
            self._store.set(str(self._rank), "done")
        except Exception:  # everybody is leaving
            return

    def _look(self, other: int, seen: dict[int, tuple[bytes, float]]) -> None:
        fault = self._read(f"fault{other}")
        if not fault:
            self._faults.pop(other, None)
        elif time.monotonic() - self._faults.setdefault(other, time.monotonic()) > GRACE_SECONDS:
            self._end(f"rank {other}, in {self.phase}: {fault.decode()}")
        beat = self._read(str(other))
        before, since = seen[other]
        if beat != before:
            seen[other] = beat, time.monotonic()
        elif beat != b"done" and time.monotonic() - since > SILENT_SECONDS:
            self._end(f"rank {other} has not answered for {SILENT_SECONDS:.0f} s, in {self.phase}")

    def _read(self, key: str) -> bytes:
        return bytes(self._store.get(key)) if self._store.check([key]) else b""

    def _end(self, what: str) -> None:
        """Leave at once: the main thread may be inside a collective that will never come back."""
        with contextlib.suppress(Exception):  # nothing keeps a rank here
            self._warn(f"rank {self._rank}: {what}; the job ends, --resume goes on from its last checkpoint")
        os._exit(EXIT_CODE)
