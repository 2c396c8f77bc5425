"""What stands between a run and those who only hear of it, trackers and the terminal: a thread and a bounded queue for
each. One that blocks, raises or is gone costs the run neither time nor steps.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

ROOM = 1000  # calls that may wait; a sink that is further behind loses what comes


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
