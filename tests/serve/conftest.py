"""Real servers on real sockets: over the tiny Gemma, or over an engine that steps when a test says so."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from gemma_ft.infer.engine import Emitted, Request
from gemma_ft.infer.session import Session, open_session
from gemma_ft.serve.address import Binding, listen, open_socket, url_of
from gemma_ft.serve.connection import SignalledServer
from gemma_ft.serve.limits import Limits
from gemma_ft.serve.run import build_server
from gemma_ft.serve.scheduler import Scheduler
from gemma_ft.system import environment
from gemma_ft.ui.stderr import StderrObserver

ROOT = Path(__file__).resolve().parents[2]
MODEL = "gemma-tiny"
PATIENCE = 30.0  # seconds that a test waits for what must come


@dataclass
class Reply:
    """An HTTP answer."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def error(self) -> dict[str, Any]:
        return dict(json.loads(self.content)["error"])


@dataclass
class Served:
    """A running server."""

    url: str
    scheduler: Scheduler
    server: SignalledServer
    thread: threading.Thread
    key: str | None = None

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def client(self, **options: Any) -> openai.OpenAI:
        given = {"api_key": self.key or "none", "max_retries": 0, "timeout": PATIENCE}
        return openai.OpenAI(base_url=f"{self.url}/v1", **{**given, **options})

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """One request by hand; `body`: bytes, chunks of bytes, or what becomes JSON."""
        connection = http.client.HTTPConnection(*self.address, timeout=PATIENCE)
        given = {"Content-Type": "application/json"} if body is not None else {}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        if isinstance(body, dict | list):
            body = json.dumps(body).encode()
        with contextlib.closing(connection):
            connection.request(method, path, body, given, encode_chunked=not isinstance(body, bytes | None))
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())

    def chat(self, **fields: Any) -> Reply:
        return self.ask("POST", "/v1/chat/completions", chat_body(**fields))


def chat_body(**fields: Any) -> dict[str, Any]:
    """A small chat, with further fields."""
    return {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], **fields}


def wait_until(true: Callable[[], bool]) -> None:
    """Bounded: fails when it does not come."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it did not happen"
        threading.Event().wait(0.005)


@contextlib.contextmanager
def serving(session: Session, limits: Limits | None = None, key: str | None = None) -> Iterator[Served]:
    """A server on a free port of this machine, ended afterwards."""
    binding, started = Binding("127.0.0.1", 0, key), threading.Event()
    opened = open_socket(binding)
    server, scheduler = build_server(session, binding, limits or Limits(), started.set, StderrObserver())
    listen(opened, binding, 16)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
    served = Served(url_of(opened), scheduler, server, thread, key)
    thread.start()
    try:
        assert started.wait(PATIENCE)
        yield served
    finally:
        server.should_exit = server.force_exit = True
        thread.join(PATIENCE)
        scheduler.stop()
        opened.close()


@dataclass
class SteppedEngine:
    """An engine without a model: it steps when it is let, and says "a" until max_new_tokens."""

    token_id: int
    max_batch: int = 2
    max_seq_len: int = 64
    fault: Exception | None = None
    steps: int = 0
    cancelled: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.asked = threading.Semaphore(0)  # released each time that the scheduler asks for a step
        self._may = threading.Semaphore(0)
        self._rows: dict[int, list[int]] = {}  # ticket: tokens made, tokens to make
        self._line: dict[int, list[int]] = {}
        self._tickets = 0

    @property
    def active(self) -> int:
        return len(self._rows)

    @property
    def waiting(self) -> int:
        return len(self._line)

    def let(self, steps: int = 1) -> None:
        self._may.release(steps)

    def submit(self, request: Request) -> int:
        self._tickets += 1
        self._line[self._tickets] = [0, request.max_new_tokens]
        return self._tickets

    def cancel(self, ticket: int) -> None:
        self._rows.pop(ticket, None)
        self._line.pop(ticket, None)
        self.cancelled.append(ticket)

    def step(self) -> list[Emitted]:
        while self._line and len(self._rows) < self.max_batch:
            ticket = next(iter(self._line))
            self._rows[ticket] = self._line.pop(ticket)
        self.asked.release()
        self._may.acquire()
        if self.fault is not None:
            raise self.fault
        self.steps += 1
        given = []
        for ticket, row in list(self._rows.items()):
            row[0] += 1
            finish = "length" if row[0] == row[1] else None
            if finish:
                del self._rows[ticket]
            given.append(Emitted(ticket, self.token_id, finish))
        return given


@pytest.fixture(scope="session")
def session() -> Session:
    """The tiny Gemma in float32, where a batch gives the same tokens as a single request."""
    environment.quiet_libraries()
    return open_session(ROOT / "data" / MODEL, dtype=torch.float32, max_batch=4)


@pytest.fixture(scope="session")
def served(session: Session) -> Iterator[Served]:
    """The tiny Gemma, served."""
    with serving(session, Limits(max_batch=4)) as one:
        yield one


@pytest.fixture
def engine(session: Session) -> Iterator[SteppedEngine]:
    """An engine that waits for the test at each step; let go at the end."""
    one = SteppedEngine(session.tokenizer.convert_tokens_to_ids("a"))
    yield one
    one.let(10_000)


@pytest.fixture
def stepped(session: Session, engine: SteppedEngine) -> Iterator[Served]:
    """A server over that engine: two at once, one waiting."""
    try:
        with serving(replace(session, engine=engine), Limits(max_batch=2, max_queue=1)) as one:
            yield one
            engine.let(10_000)
    finally:
        engine.let(10_000)
