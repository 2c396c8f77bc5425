"""A console that nobody can block or break: what is written goes through a bounded queue and a thread of its own."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Any

from rich.console import Console

from gemma_ft.train.guard import ROOM, Guard

SHOW_SECONDS = 10  # how long the end of a run waits for a terminal that takes nothing
# Of a write: nobody will ever read this stream again. Another fault (a full disk) may pass.
GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ESTALE, errno.ECONNRESET)


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
