"""Who may ask, how much, how slowly: keys, hosts, bodies, connections. And what is not there."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Iterator

import openai
import pytest

from gemma_ft.infer.session import Session
from gemma_ft.serve.address import Binding
from gemma_ft.serve.limits import Limits
from gemma_ft.serve.metrics import SECONDS
from tests.serve.conftest import PATIENCE, Served, chat_body, serving, wait_until

KEY = "correct-horse-battery"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SLOW = Limits(read_seconds=0.2, write_seconds=0.2, connections=3, keep_alive_seconds=60)


@pytest.fixture(scope="module")
def locked(session: Session) -> Iterator[Served]:
    with serving(session, Limits(max_batch=4), key=KEY) as one:
        yield one


@pytest.fixture
def impatient(session: Session) -> Iterator[Served]:
    """A server with short timeouts and few connections."""
    with serving(session, SLOW) as one:
        yield one


def raw(served: Served, content: bytes) -> socket.socket:
    connection = socket.create_connection(served.address, timeout=PATIENCE)
    connection.sendall(content)
    return connection


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes."""
    parts = []
    with contextlib.closing(connection), contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def send_often(connection: socket.socket, content: bytes, *, times: int) -> None:
    for _ in range(times):
        connection.sendall(content)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/metrics", "/nowhere"])
@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY, "Bearer é"]
)
def test_without_the_key_nothing_is_told(locked: Served, path: str, header: str | None) -> None:
    reply = locked.ask("GET", path, **({} if header is None else {"Authorization": header.encode("latin-1")}))  # type: ignore[arg-type]
    assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
    assert reply.error == {
        "message": "a valid API key is needed: Authorization: Bearer KEY",
        "type": "authentication_error",
        "param": None,
        "code": "invalid_api_key",
    }


def test_with_the_key(locked: Served) -> None:
    """And without it, whether the server lives; two keys in one request are none."""
    assert locked.client().models.list().data[0].id == "gemma-tiny"
    assert locked.ask("GET", "/health").status == 200
    assert locked.ask("GET", "/metrics", Authorization=f"bearer {KEY}").status == 200
    with pytest.raises(openai.AuthenticationError):
        locked.client(api_key="wrong").models.list()
    two = f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer {KEY}\r\n"
    two += f"Authorization: Bearer {KEY}\r\n\r\n"
    assert read_all(raw(locked, two.encode())).startswith(b"HTTP/1.1 401 ")


def test_behind_a_proxy_the_key_alone_decides(locked: Served) -> None:
    """A proxy passes on the Host that it was asked for; a page whose name was moved here cannot know the key."""
    for key, status in ((KEY, 200), ("wrong", 401)):
        assert locked.ask("GET", "/v1/models", Host="gemma.example", Authorization=f"Bearer {key}").status == status


def test_the_key_is_in_no_representation() -> None:
    assert KEY not in repr(Binding("127.0.0.1", 0, KEY))


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("LOCALHOST:9", 200), ("127.0.0.1:8000", 200), ("127.9.9.9", 200), ("[::1]:8000", 200),
     ("evil.example", 403), ("evil.example:8000", 403), ("127.0.0.1.evil.example", 403), ("localhost.evil", 403),
     ("10.0.0.1", 403), ("", 403), ("[::1", 200), ("[::2]", 403), ("localhost:1:2", 403)],
)  # fmt: skip
def test_a_page_that_had_its_name_moved_here_is_refused(served: Served, host: str, status: int) -> None:
    for path in ("/v1/models", "/health"):
        assert served.ask("GET", path, Host=host).status == status


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
def test_what_a_form_can_send_is_refused(served: Served, kind: str | None) -> None:
    """A page of another site may send such bodies without asking first."""
    headers = "" if kind is None else f"Content-Type: {kind}\r\n"
    request = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}"
    answer = read_all(raw(served, f"{request}Content-Length: 2\r\n\r\n{{}}".encode()))
    assert answer.startswith(b"HTTP/1.1 415 ")
    assert b"Content-Type must be application/json" in answer


def test_json_with_a_charset_is_json(served: Served) -> None:
    body = json.dumps(chat_body(max_tokens=1)).encode()
    reply = served.ask("POST", "/v1/chat/completions", body, Content_Type="Application/JSON; charset=utf-8")
    assert reply.status == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/docs", 404), ("GET", "/redoc", 404), ("GET", "/openapi.json", 404),
     ("GET", "/v1", 404), ("GET", "/v1/models/", 404), ("GET", "/v1/chat/completions", 405),
     ("POST", "/v1/models", 405), ("GET", "/v1/completions/", 404), ("OPTIONS", "/v1/chat/completions", 405),
     ("GET", "/../../etc/passwd", 404), ("DELETE", "/health", 405), ("GET", "/v1/models/%00%0a", 404)],
)  # fmt: skip
def test_what_is_not_there(served: Served, method: str, path: str, status: int) -> None:
    reply = served.ask(method, path, b"{}" if method == "POST" else None)
    assert reply.status == status
    assert reply.error["type"] == "invalid_request_error"
    assert not any(name.startswith("access-control") for name in reply.headers)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_is_at_most_a_mebibyte(served: Served, chunked: bool) -> None:
    """Over by one byte, and at the limit; declared, or sent in chunks of unknown number."""

    def send(size: int) -> int:
        body = json.dumps(chat_body(messages=[{"role": "user", "content": "a"}])).encode()
        body = body[:-1] + b" " * (size - len(body)) + b"}"
        parts = [body[at : at + 50_000] for at in range(0, size, 50_000)]
        reply = served.ask("POST", "/v1/chat/completions", iter(parts) if chunked else body)
        assert reply.status == 200 or reply.error["message"] == "the body is longer than 1048576 bytes"
        return reply.status

    assert send((1 << 20) + 1) == 413
    assert send(1 << 20) == 200


def test_a_body_that_is_declared_too_long_is_not_waited_for(served: Served) -> None:
    with contextlib.closing(raw(served, POST + b"Content-Length: 1048577\r\n\r\n")) as connection:
        assert connection.recv(13) == b"HTTP/1.1 413 "


def test_rubbish_behind_a_refusal_ends_the_connection(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    connection = raw(served, b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
    assert connection.recv(13) == b"HTTP/1.1 415 "
    connection.sendall(b"no chunk\r\n")
    assert b"not HTTP" not in read_all(connection)
    assert served.ask("GET", "/health").status == 200
    assert caplog.records == []


def test_nobody_may_send_without_end(served: Served) -> None:
    """A body that goes on after its refusal is read away up to a bound, then the connection is cut."""
    connection = raw(served, POST + b"Transfer-Encoding: chunked\r\n\r\n")
    with contextlib.closing(connection), pytest.raises(ConnectionError):
        send_often(connection, b"100000\r\n" + b"a" * (1 << 20) + b"\r\n", times=64)


@pytest.mark.parametrize(
    "begun",
    [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
     POST + b"Content-Length: 9\r\n\r\n{",
     b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea"],
)  # fmt: skip
def test_a_request_that_does_not_come_to_its_end_is_cut(impatient: Served, begun: bytes) -> None:
    """Nothing sent, half a head, half a body; also behind a request that was answered."""
    answer = read_all(raw(impatient, begun))
    assert answer.startswith(b"HTTP/1.1 200 ") if begun.endswith(b"\n\r\nGET /hea") else answer == b""
    wait_until(lambda: not impatient.server.server_state.connections)


def test_an_answer_that_is_not_read_is_cut(impatient: Served) -> None:
    """Requests are pipelined, and none of the answers read: the connection does not stay."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(PATIENCE)
    connection.connect(impatient.address)
    with contextlib.closing(connection), pytest.raises(ConnectionError):
        send_often(connection, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100, times=100_000)
    wait_until(lambda: not impatient.server.server_state.connections)


def test_connections_are_counted(impatient: Served) -> None:
    """One too many is told so; the others go on, and make room when they leave."""
    held = []
    for _ in range(SLOW.connections):
        held.append(raw(impatient, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"))
        assert held[-1].recv(12) == b"HTTP/1.1 200"
    answer = read_all(raw(impatient, b""))
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_many_connections"
    for one in held:
        one.close()
    wait_until(lambda: not impatient.server.server_state.connections)
    assert impatient.ask("GET", "/health").status == 200


@pytest.mark.parametrize(
    "content",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"HELLO\r\n\r\n",
     b"GET / HTTP/1.1\r\n\r\n", b"GET /" + b"a" * 100_000, b"GET / HTTP/1.1\r\nHost: localhost\r\nA: " + b"a" * 100_000,
     POST + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n", POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}"],
    ids=lambda content: repr(content[:20]),
)  # fmt: skip
def test_what_is_not_http(served: Served, content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    answer = read_all(raw(served, content))
    too_long = len(content) > 65_536  # closed with bytes unread: the system may drop the answer on its way
    if answer or not too_long:
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"] == "this is not HTTP/1.1"
    assert served.ask("GET", "/health").status == 200
    assert capfd.readouterr() == ("", "")


def test_metrics_can_be_read(served: Served) -> None:
    """Each line of the text format, the counts of a request, and labels that clients cannot multiply."""
    sample = re.compile(r'([a-z_]+)(\{[a-z]+="[^"\\]*"(?:,[a-z]+="[^"\\]*")*\})? ([0-9.e+-]+)')

    def read() -> dict[str, float]:
        reply = served.ask("GET", "/metrics")
        assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        found, kinds = {}, {}
        for line in reply.content.decode().splitlines():
            if line.startswith("# TYPE "):
                _, _, name, kinds_name = line.split(" ")
                kinds[name] = kinds_name
            elif not line.startswith("# HELP "):
                match = sample.fullmatch(line)
                assert match, line
                assert any(match[1].startswith(name) for name in kinds), line
                found[match[1] + (match[2] or "")] = float(match[3])
        assert set(kinds.values()) == {"counter", "gauge", "histogram"}
        return found

    served.chat(max_tokens=1)
    served.ask("GET", "/nowhere")
    read()
    before = read()
    usage = json.loads(served.chat(max_tokens=3, temperature=0).content)["usage"]
    for name in range(20):
        served.ask("GET", f"/{name}")
    after = read()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown("gemma_ft_generated_tokens_total") == usage["completion_tokens"] == 3
    assert grown("gemma_ft_prompt_tokens_total") == usage["prompt_tokens"] == 12
    assert grown('gemma_ft_requests_total{route="/v1/chat/completions",status="200"}') == 1
    assert grown('gemma_ft_requests_total{route="other",status="404"}') == 20
    assert grown("gemma_ft_time_to_first_token_seconds_count") == 1
    route = 'route="/v1/chat/completions"'
    buckets = [after[name] for name in after if name.startswith("gemma_ft_request_seconds_bucket{") and route in name]
    assert len(buckets) == len(SECONDS) + 1
    assert buckets == sorted(buckets)
    assert buckets[-1] == after[f"gemma_ft_request_seconds_count{{{route}}}"]
    assert (after["gemma_ft_active"], after["gemma_ft_queue_length"]) == (0, 0)
    assert after.keys() == before.keys()


def test_a_prompt_counts_once_however_many_answers_it_gets(served: Served) -> None:
    def counted() -> int:
        text = served.ask("GET", "/metrics").content.decode()
        found = re.search(r"^gemma_ft_prompt_tokens_total (\S+)$", text, re.MULTILINE)
        assert found
        return int(float(found[1]))

    before = counted()
    usage = json.loads(served.chat(max_tokens=1, n=3, temperature=0).content)["usage"]
    assert counted() - before == usage["prompt_tokens"] == 12
