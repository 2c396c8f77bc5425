"""What stands between a run and those who only hear of it, trackers and the terminal: a thread and a bounded queue for
each. One that blocks, raises or is gone costs the run neither time nor steps.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import queue
import select
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Any

from rich.console import Console

ROOM = 1000  # calls that may wait; a sink that is further behind loses what comes
SHOW_SECONDS = 10  # how long the end of a run waits for a terminal that takes nothing
# Of a write: nobody will ever read this stream again. Another fault (a full disk) may pass.
GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ESTALE, errno.ECONNRESET)


class Guard:
    """Calls on one sink, made in order by a thread of their own; the first that raises is the last.

    `on_fault(error)` is called once, by that thread.
    """

    def __init__(self, name: str, on_fault: Callable[[BaseException], None], *, room: int = ROOM) -> None:
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(room)
        self._on_fault = on_fault
        self._failed = False
        self._thread = threading.Thread(target=self._work, name=f"gemma-ft: {name}", daemon=True)

    def post(self, call: Callable[[], None]) -> bool:
        """Have a call made; False where it is left out, for too many are waiting."""
        if self._failed:
            return True
        if self._thread.ident is None:
            self._thread.start()
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            return False
        return True

    def close(self, seconds: float) -> bool:
        """Wait for what was posted, so many seconds at most; whether nothing is left. The guard takes no more calls."""
        if not self._thread.is_alive():  # never begun, or at its end
            return True
        end = time.monotonic() + seconds
        try:
            self._calls.put(None, timeout=seconds)
        except queue.Full:
            return False
        self._thread.join(max(0.0, end - time.monotonic()))
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            if self._failed:
                continue
            try:
                call()
            except BaseException as error:  # whatever a sink raises, no run ends of it
                self._failed = True
                self._on_fault(error)


class GuardedOutput(io.TextIOBase):
    """A text stream that hands what is written to another one, behind a guard. `on_gone()`: nobody reads it any more.

    What finds no room while the other one blocks is left out, and a line says so when it goes on.
    """

    def __init__(self, stream: IO[str], on_gone: Callable[[], None], *, room: int = ROOM) -> None:
        self._stream, self._left_out = stream, 0
        self._guard = Guard("output", lambda error: on_gone(), room=room)
        self._descriptor = _descriptor(stream)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the other stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether the other stream is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """The other stream's."""
        return self._stream.fileno()

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, text: str) -> int:
        """Never blocks, and never raises."""
        if self._left_out and self._guard.post(partial(self._put, f"({self._left_out} lines were left out)\n")):
            self._left_out = 0
        if not self._guard.post(partial(self._put, text)):
            self._left_out += text.count("\n")
        return len(text)

    def finish(self, seconds: float = SHOW_SECONDS) -> bool:
        """Wait until all is written, so many seconds at most; whether it is."""
        return self._guard.close(seconds)

    def _put(self, text: str) -> None:
        try:
            if self._descriptor is None:
                self._stream.write(text)
                self._stream.flush()
            else:
                _write_all(self._descriptor, text.encode(self.encoding, "replace"))
        except OSError as error:
            if error.errno in GONE:
                raise


@contextlib.contextmanager
def guarded(console: Console, on_gone: Callable[[], None]) -> Iterator[None]:
    """While this is open a console writes behind a guard. `on_gone()` is called when nobody reads it any more."""
    stream = console.file
    output = GuardedOutput(stream, on_gone)
    console.file = output  # type: ignore[assignment]
    try:
        yield
    finally:
        output.finish()
        console.file = stream


def _descriptor(stream: Any) -> int | None:
    """The descriptor to write to, past the stream's own buffer: Python would wait for that one as it ends, where the
    guard's thread blocks. None for what is no file (of a notebook, of a test).
    """
    if not isinstance(stream, io.TextIOWrapper):
        return None
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
        return stream.fileno()
    return None


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:  # a terminal that another program has left so
            select.select([], [descriptor], [])
