"""Where a server may listen, how it ends, and with which exit code."""

from __future__ import annotations

import contextlib
import http.client
import json
import shlex
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from gemma_ft.errors import UserError
from gemma_ft.infer.session import Session
from gemma_ft.serve.address import Binding, checked_binding, is_loopback, listen, open_socket, url_of
from gemma_ft.serve.connection import SignalledServer
from gemma_ft.serve.limits import Limits
from gemma_ft.serve.run import greeting, run_server, uvicorn_config
from gemma_ft.ui.stderr import StderrObserver
from tests.serve.conftest import PATIENCE, SteppedEngine, chat_body


async def nothing(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI application that has nothing to start or stop."""
    for answer in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{answer}.complete"})


@pytest.mark.parametrize(
    ("host", "inside"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("localhost", True), ("LocalHost", True),
     ("0.0.0.0", False), ("::", False), ("", False), ("192.168.1.5", False), ("example.com", False),
     ("localhost.example.com", False), ("127.0.0.1.example.com", False), ("::ffff:127.0.0.1", False)],
)  # fmt: skip
def test_which_addresses_are_this_machines_alone(host: str, inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_loopback(host) is inside
    monkeypatch.setenv("SERVER_KEY", "secret-key")
    assert checked_binding(host, 1, "SERVER_KEY") == Binding(host, 1, "secret-key")
    if inside:
        assert checked_binding(host, 1, None).key is None
    else:
        with pytest.raises(UserError) as caught:
            checked_binding(host, 1, None)
        assert str(caught.value) == (
            f"--host {host}: others could reach it, so it needs an API key; put one into an environment variable and "
            "name that with --api-key-env, or bind to 127.0.0.1"
        )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "--api-key-env: the variable it names is not set, or empty; export it first"),
        ("", "--api-key-env: the variable it names is not set, or empty; export it first"),
        ("two words", "--api-key-env: an API key is made of printable ASCII characters without blanks"),
        ("line\n", "--api-key-env: an API key is made of printable ASCII characters without blanks"),
        ("clé", "--api-key-env: an API key is made of printable ASCII characters without blanks"),
    ],
)
def test_a_key_that_is_none(value: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On loopback too; neither the key nor what was given for its name is repeated."""
    monkeypatch.delenv("SERVER_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("SERVER_KEY", value)
    with pytest.raises(UserError) as caught:
        checked_binding("127.0.0.1", 1, "SERVER_KEY")
    assert str(caught.value) == message


def test_a_port_in_use_and_an_address_that_is_not_here() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError) as caught:
            open_socket(Binding("127.0.0.1", port))
        message = f"--port {port}: in use; stop what listens there, or choose another with --port"
        assert str(caught.value) == message
    first = open_socket(Binding("localhost", 0))
    second = open_socket(Binding("127.0.0.1", first.getsockname()[1]))  # bound twice, as long as nobody listens
    with first, second:
        listen(first, Binding("localhost", 0), 1)
        with pytest.raises(UserError, match=r"^--port 7: in use; stop"):
            listen(second, Binding("127.0.0.1", 7), 1)
        assert url_of(first) == f"http://127.0.0.1:{first.getsockname()[1]}"
    with pytest.raises(UserError) as caught:
        open_socket(Binding("203.0.113.9", 0, "key"))
    assert str(caught.value) == "--host 203.0.113.9: cannot be bound: Cannot assign requested address"


@pytest.fixture
def heard_hangup() -> Iterator[None]:
    """SIGHUP as a terminal leaves it: under nohup it is ignored, and then stays so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_a_signal_ends_it_with_its_code(heard_hangup: None, number: int, code: int) -> None:
    """Nothing is raised again, and the handlers from before are back."""
    before = signal.getsignal(number)
    server = SignalledServer(uvicorn_config(nothing, Limits()), lambda: signal.raise_signal(number))
    with open_socket(Binding("127.0.0.1", 0)) as opened:
        listen(opened, Binding("127.0.0.1", 0), 1)
        server.run(sockets=[opened])
    assert server.exit_code == code
    assert signal.getsignal(number) is before


def test_a_failed_engine_is_raised_when_the_server_has_ended(
    session: Session, engine: SteppedEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    """The command line makes one line and exit code 1 of it. Before, the server said where it is and how to call it."""
    engine.fault = RuntimeError("broken")
    engine.let()
    binding = Binding("127.0.0.1", 0, "secret-key")
    opened = open_socket(binding)
    url = url_of(opened)
    limits = Limits(max_batch=2, max_queue=3, max_tokens=9)
    ended: Future[int] = Future()

    def run() -> None:
        try:
            ended.set_result(
                run_server(
                    replace(session, engine=engine),
                    opened,
                    binding,
                    limits,
                    key_variable="SERVER_KEY",
                    observer=StderrObserver(),
                )
            )
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # a server that does not end must not keep the suite
    connection = None
    while connection is None:  # bounded: the server says so if it cannot start
        assert not ended.done(), ended.result()
        with contextlib.suppress(ConnectionRefusedError):
            attempt = http.client.HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE)
            attempt.connect()
            connection = attempt
    headers = {"Content-Type": "application/json", "Authorization": "Bearer secret-key"}
    connection.request("POST", "/v1/chat/completions", json.dumps(chat_body()), headers)
    assert connection.getresponse().status == 500
    connection.close()
    with pytest.raises(RuntimeError, match=r"^broken$"):
        ended.result(PATIENCE)
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err == (
        f"gemma-ft serves gemma-tiny at {url}/v1\n"
        "  limits   2 answers at once, 3 waiting, 9 tokens an answer, context 64\n"
        f"  try      curl {url}/v1/chat/completions -H 'Content-Type: application/json' "
        '-H "Authorization: Bearer $SERVER_KEY" '
        '-d \'{"model": "gemma-tiny", "messages": [{"role": "user", "content": "Hello"}]}\'\n'
        "  stop     Ctrl-C\n"
    )


def test_a_name_that_breaks_lines_and_quotes() -> None:
    """What is shown can be pasted, whatever the model's folder is called."""
    session: Any = SimpleNamespace(name='a"b\n\x1b[31mc', engine=SimpleNamespace(max_seq_len=64))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("gemma_ft.serve.run.served_id", lambda session: session.name)
        lines = greeting(session, "http://h", Limits(), None)
    assert lines[0] == 'gemma-ft serves a"bc at http://h/v1'
    assert len(lines) == 4
    body = shlex.split(lines[2])[-1]
    assert json.loads(body)["model"] == session.name
