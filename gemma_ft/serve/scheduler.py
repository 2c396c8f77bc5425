"""The one thread that drives the engine, and the bounded line in front of it.

Requests come in on the event loop's thread; they join between two decode steps. What the engine gives goes back as
pieces of text, all those of one step in one call. Only the engine's thread touches the engine; only the event loop's
thread touches the open jobs and the metrics.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gemma_ft.errors import UserError
from gemma_ft.infer.detokenize import TextStream
from gemma_ft.infer.engine import Emitted, Request
from gemma_ft.infer.sampling import Sampling
from gemma_ft.serve.errors import ApiFault, engine_stopped
from gemma_ft.serve.limits import Limits
from gemma_ft.serve.metrics import Metrics

Finish = Literal["stop", "length"]
RETRY_SECONDS = "1"


@dataclass(frozen=True)
class Piece:
    """What one step gave one answer: text that is certain (often its token's, sometimes none), and how it ended."""

    choice: int
    text: str
    tokens: int
    finish: Finish | None


@dataclass(eq=False)
class Job:
    """One answer to be generated: the `choice`-th of its call."""

    choice: int
    prompt_ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    stop: Sequence[str] = ()


@dataclass(eq=False)
class Call:
    """The answers of one HTTP request, and what has come of them."""

    jobs: list[Job]
    deadline: float  # time.monotonic
    pieces: asyncio.Queue[Piece | ApiFault] = field(default_factory=asyncio.Queue)
    open: set[Job] = field(default_factory=set)
    begun: float = 0.0
    first: bool = True

    async def results(self) -> AsyncIterator[Piece]:
        """Pieces as they come, until every answer has ended. Raises: ApiFault when time is up, or the engine failed."""
        left = len(self.jobs)
        while left:
            try:
                async with asyncio.timeout(max(0.0, self.deadline - time.monotonic())):
                    piece = await self.pieces.get()
            except TimeoutError:
                raise ApiFault(504, "the answer took too long; ask for fewer tokens", code="timeout") from None
            if isinstance(piece, ApiFault):
                raise piece
            left -= piece.finish is not None
            yield piece


class Scheduler:
    """Continuous batching of calls over one engine, on a thread of its own."""

    def __init__(self, engine: Any, tokenizer: Any, limits: Limits, on_failure: Callable[[], None] = lambda: None):
        self.engine, self.tokenizer, self.limits, self.on_failure = engine, tokenizer, limits, on_failure
        self.metrics = Metrics(lambda: int(engine.active), lambda: max(0, self.open - int(engine.active)))
        self.failure: BaseException | None = None
        self.open = 0  # answers that are running or waiting
        self._calls: dict[Job, Call] = {}
        self._orders: list[tuple[Literal["submit", "cancel"], Job]] = []  # guarded by _wake
        self._wake = threading.Condition()
        self._stopping = False
        self._stepping_since: float | None = None
        self._tickets: dict[Job, int] = {}  # the engine's thread alone
        self._running: dict[int, tuple[Job, TextStream]] = {}  # likewise
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._drive, name="engine", daemon=True)

    def start(self) -> None:
        """Start the engine's thread; to be called on the event loop whose requests it serves."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self, seconds: float = 10.0) -> None:
        """End the engine's thread after the step it is in; may be called more than once, from any thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(seconds)

    @property
    def health(self) -> str:
        """ok; or starting, failed, stopped, or stalled: in one step for longer than a whole request may take."""
        if self.failure is not None:
            return "failed"
        if not self._thread.is_alive():
            return "starting" if self._thread.ident is None else "stopped"
        since = self._stepping_since
        return "stalled" if since is not None and time.monotonic() - since > self.limits.request_seconds else "ok"

    def check_room(self, answers: int) -> None:
        """Raises ApiFault when so many answers are more than the line takes, now (429) or ever (400)."""
        if self.health in ("failed", "stopped"):
            raise engine_stopped(503)
        capacity = self.limits.capacity
        if answers > capacity:
            raise ApiFault(400, f"{answers} answers in one request; this server takes up to {capacity}")
        if self.open + answers > capacity:
            raise ApiFault(
                429,
                "too many requests are waiting; try again",
                code="queue_full",
                headers={"Retry-After": RETRY_SECONDS},
            )

    def submit(self, jobs: list[Job], prompt_tokens: int) -> Call:
        """Put the answers of one request in line; its prompts have `prompt_tokens` together.

        Raises: ApiFault when the line is full, or the engine has failed.
        """
        self.check_room(len(jobs))
        now = time.monotonic()
        call = Call(jobs, now + self.limits.request_seconds, open=set(jobs), begun=now)
        self.open += len(jobs)
        self._calls.update(dict.fromkeys(jobs, call))
        self.metrics.prompt_tokens.inc(prompt_tokens)
        self._order("submit", jobs)
        return call

    def cancel(self, call: Call) -> None:
        """Give up what of a call has not ended; the engine drops it before its next step."""
        left = [job for job in call.jobs if job in call.open]
        for job in left:
            self._close(job)
        self.metrics.cancelled.inc(len(left))
        if left:
            self._order("cancel", left)

    # --- the event loop's thread

    def _order(self, what: Literal["submit", "cancel"], jobs: Sequence[Job]) -> None:
        with self._wake:
            self._orders += [(what, job) for job in jobs]
            self._wake.notify()

    def _close(self, job: Job) -> None:
        self._calls.pop(job).open.discard(job)
        self.open -= 1

    def _deliver(self, given: list[tuple[Job, Piece]]) -> None:
        for job, piece in given:
            self.metrics.answer_tokens.inc(piece.tokens)
            call = self._calls.get(job)
            if call is None:  # given up in the meantime
                continue
            if call.first:
                call.first = False
                self.metrics.first_token.observe(time.monotonic() - call.begun)
            if piece.finish is not None:
                self._close(job)
            call.pieces.put_nowait(piece)

    def _refuse(self, job: Job, fault: ApiFault) -> None:
        call = self._calls.get(job)
        if call is not None:
            self._close(job)
            call.pieces.put_nowait(fault)

    def _fail_all(self) -> None:
        for call in set(self._calls.values()):
            call.pieces.put_nowait(engine_stopped(500))
        for job in list(self._calls):
            self._close(job)
        self.on_failure()

    # --- the engine's thread

    def _drive(self) -> None:
        try:
            while self._take_orders():
                if not self._running:  # all that was running has been given up
                    continue
                self._stepping_since = time.monotonic()
                given = [pair for emitted in self.engine.step() if (pair := self._piece(emitted)) is not None]
                self._stepping_since = None
                if given:
                    self._tell(self._deliver, given)
        except BaseException as error:
            self.failure = error
            self._tell(self._fail_all)

    def _take_orders(self) -> bool:
        """Wait until there is something to do, and pass orders on to the engine; False: the server stops."""
        with self._wake:
            self._wake.wait_for(lambda: self._orders or self._stopping or self._running)
            orders, self._orders = self._orders, []
        if self._stopping:
            return False
        for what, job in orders:
            if what == "submit":
                self._start(job)
            elif job in self._tickets:  # otherwise it ended by itself meanwhile
                self._drop(job, running=True)
        return True

    def _start(self, job: Job) -> None:
        try:
            ticket = self.engine.submit(Request(job.prompt_ids, job.max_new_tokens, job.sampling))
        except UserError as error:  # one request that cannot be is no failure of the engine
            self._tell(self._refuse, job, ApiFault(400, str(error)))
            return
        self._tickets[job] = ticket
        self._running[ticket] = (job, TextStream(self.tokenizer, job.stop))

    def _drop(self, job: Job, *, running: bool) -> None:
        ticket = self._tickets.pop(job)
        del self._running[ticket]
        if running:
            self.engine.cancel(ticket)

    def _piece(self, emitted: Emitted) -> tuple[Job, Piece] | None:
        if emitted.ticket not in self._running:
            return None
        job, stream = self._running[emitted.ticket]
        text = stream.push(emitted.token_id) if emitted.token_id is not None else ""
        finish: Finish | None = emitted.finish
        if finish is not None and not stream.stopped:
            text += stream.end()
        if stream.stopped:
            finish = "stop"
        if finish is not None:
            self._drop(job, running=emitted.finish is None)
        return job, Piece(job.choice, text, int(emitted.token_id is not None), finish)

    def _tell(self, what: Callable[..., None], *given: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(what, *given)
        except RuntimeError:  # the loop has ended: nobody is waiting any more
            self._stopping = True
