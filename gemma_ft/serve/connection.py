"""uvicorn's connection and server, with the timeouts and endings that it does not have."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from socket import socket
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gemma_ft.serve.errors import ApiFault
from gemma_ft.serve.limits import Limits
from gemma_ft.system import environment

STOPPED_BY_SIGNAL = 143
READING = (h11.IDLE, h11.SEND_BODY)  # states of a client that has not sent its whole request


class GuardedConnection(H11Protocol):
    """One connection that no client can hold by being slow: a request must be in, and an answer be taken, in time.

    uvicorn has a timeout for the pause between requests only. hypercorn's read_timeout begins anew with each part that
    comes in, so that a byte a second holds a connection for ever; it waits without end for a client that does not read,
    and counts no connections: under it, all of this would have to be written as well.
    """

    def __init__(self, limits: Limits, **given: Any) -> None:
        super().__init__(**given)
        self.limits = limits
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._received = 0  # bytes of the request that is coming in

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or refuse it where there are too many."""
        super().connection_made(transport)
        self._watch_reading()
        if len(self.connections) > self.limits.connections:
            self._refuse(ApiFault(503, "too many connections", code="too_many_connections"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        self._cancel_reading()
        self._cancel_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take in a part of a request; cut off a client that goes on sending one that was refused."""
        self._received += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        self._watch_reading()
        if self._received > self.limits.drained_bytes:
            self.transport.abort()

    def on_response_complete(self) -> None:
        """Between two requests uvicorn's own timeout runs, unless the next one has begun already."""
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE:
            self._cancel_reading()
            if self.conn.trailing_data[0]:
                self._watch_reading()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP; where an answer has begun, cut it."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(ApiFault(400, "this is not HTTP/1.1"))
        else:
            self.transport.abort()

    def pause_writing(self) -> None:
        """The client reads more slowly than the answer comes: it has so long to go on."""
        super().pause_writing()
        self._writing = self.loop.call_later(self.limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        self._cancel_writing()

    def _watch_reading(self) -> None:
        """One deadline for a whole request, head and body, from the connection's or the request's first byte on."""
        if self.conn.their_state not in READING:
            self._cancel_reading()
        elif self._reading is None:
            self._reading = self.loop.call_later(self.limits.read_seconds, self.transport.abort)

    def _cancel_reading(self) -> None:
        self._received = 0
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _cancel_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def _refuse(self, fault: ApiFault) -> None:
        headers = [("content-type", "application/json"), ("content-length", str(len(fault.content)))]
        response = h11.Response(status_code=fault.status, headers=[*headers, ("connection", "close")])
        for event in (response, h11.Data(data=fault.content), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class SignalledServer(uvicorn.Server):
    """uvicorn's server, which ends with an exit code instead of raising its signal again."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self.on_started = on_started
        self.signals: list[int] = []

    @property
    def exit_code(self) -> int:
        """0 after Ctrl-C, 143 after SIGTERM or SIGHUP."""
        return STOPPED_BY_SIGNAL if {signal.SIGTERM, signal.SIGHUP} & set(self.signals) else 0

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Begin to serve, and say so."""
        await super().startup(sockets)
        if self.started:
            self.on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop taking requests; a second Ctrl-C does not wait for answers."""
        self.signals.append(sig)
        super().handle_exit(sig, frame)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals end the server while it runs, where it runs on the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM, *environment.hangup())
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
