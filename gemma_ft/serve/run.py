"""Serve an open session until a signal comes."""

from __future__ import annotations

import functools
import json
import logging
import shlex
import socket
from collections.abc import Callable

import uvicorn

from gemma_ft.infer.session import Session
from gemma_ft.serve.address import Binding, listen, url_of
from gemma_ft.serve.app import build_app, served_id
from gemma_ft.serve.connection import GuardedConnection, SignalledServer
from gemma_ft.serve.limits import Limits
from gemma_ft.serve.scheduler import Scheduler
from gemma_ft.system import environment
from gemma_ft.system.escape import printable
from gemma_ft.system.observer import SILENT, Observer


def run_server(
    session: Session,
    opened: socket.socket,
    binding: Binding,
    limits: Limits,
    *,
    key_variable: str | None = None,
    observer: Observer = SILENT,
) -> int:
    """Serve on a bound socket; returns the exit code: 0 after Ctrl-C, 143 after SIGTERM. `observer` is told what is
    served where, and faults of ours.

    Raises: UserError when the port was taken meanwhile; the engine's exception when it failed, after everybody waiting
    has been told: the state of its model is unknown then, and a fresh process is the only sure cure.
    """

    def started() -> None:
        observer.warn("\n".join(greeting(session, url_of(opened), limits, key_variable)))

    server, scheduler = build_server(session, binding, limits, started, observer)
    listen(opened, binding, server.config.backlog)
    try:
        server.run(sockets=[opened])
    finally:
        scheduler.stop()
        opened.close()
    if scheduler.failure is not None:
        raise scheduler.failure
    return server.exit_code


def build_server(
    session: Session, binding: Binding, limits: Limits, on_started: Callable[[], None], observer: Observer = SILENT
) -> tuple[SignalledServer, Scheduler]:
    """A server that is not running yet, and the scheduler whose failure ends it."""
    scheduler = Scheduler(session.engine, session.tokenizer, limits)
    server = SignalledServer(
        uvicorn_config(build_app(session, scheduler, limits, binding, observer), limits), on_started
    )
    scheduler.on_failure = lambda: setattr(server, "should_exit", True)
    return server, scheduler


def uvicorn_config(app: object, limits: Limits) -> uvicorn.Config:
    """uvicorn without its logs (paths and peers are nobody's business), other protocols and trust in proxies."""
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=functools.partial(GuardedConnection, limits),  # type: ignore[arg-type]
        ws="none",
        loop="asyncio",
        lifespan="on",
        workers=1,
        log_config=None,
        log_level=logging.ERROR if environment.debug_enabled() else logging.CRITICAL + 1,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=limits.keep_alive_seconds,
        timeout_graceful_shutdown=limits.shutdown_seconds,
    )


def greeting(session: Session, url: str, limits: Limits, key_variable: str | None) -> list[str]:
    """Lines for whoever starts a server: what is served where, within which limits, and a call to try it with."""
    model = served_id(session)
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    key = f' -H "Authorization: Bearer ${key_variable}"' if key_variable is not None else ""
    return [
        f"gemma-ft serves {''.join(printable(model).splitlines())} at {url}/v1",
        f"  limits   {limits.max_batch} answers at once, {limits.max_queue} waiting, {limits.max_tokens} tokens an "
        f"answer, context {session.engine.max_seq_len}",
        f"  try      curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}",
        "  stop     Ctrl-C",
    ]
