"""The line in front of the engine, step by step: who waits, who is refused, who is dropped, and what a failure does."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import openai
import pytest

from gemma_ft.build.located import Source
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.errors import UserError
from gemma_ft.infer.session import Session
from gemma_ft.serve.app import served_id
from gemma_ft.serve.limits import Limits
from tests.serve.conftest import (
    MODEL,
    PATIENCE,
    Reply,
    Served,
    SteppedEngine,
    chat_body,
    serving,
    wait_until,
)


@pytest.fixture
def later() -> Iterator[Callable[..., Future[Any]]]:
    """Runs something on another thread."""
    with ThreadPoolExecutor(8) as pool:
        yield pool.submit


def metric(served: Served, name: str) -> float:
    lines = served.ask("GET", "/metrics").content.decode().splitlines()
    return next(float(line.split(" ")[1]) for line in lines if line.startswith(f"{name} "))


def test_new_requests_join_between_two_steps(
    stepped: Served, engine: SteppedEngine, later: Callable[..., Future[Reply]]
) -> None:
    first = later(stepped.chat, max_tokens=3)
    assert engine.asked.acquire(timeout=PATIENCE)
    second = later(stepped.chat, max_tokens=2)
    wait_until(lambda: stepped.scheduler.open == 2)
    engine.let()
    assert engine.asked.acquire(timeout=PATIENCE)
    assert engine.active == 2  # the second came in while the first was being answered
    engine.let(2)
    replies = [json.loads(one.result(PATIENCE).content) for one in (first, second)]
    assert [reply["choices"][0]["message"]["content"] for reply in replies] == ["aaa", "aa"]
    assert engine.steps == 3


def test_the_line_is_bounded(stepped: Served, engine: SteppedEngine, later: Callable[..., Future[Reply]]) -> None:
    """Two run, one waits, the next is refused and told when to come again; then there is room once more."""
    running = [later(stepped.chat, max_tokens=1) for _ in range(3)]
    wait_until(lambda: stepped.scheduler.open == 3 and engine.active >= 1)
    refused = stepped.chat(max_tokens=1)
    assert (refused.status, refused.headers["retry-after"]) == (429, "1")
    assert refused.error == {
        "message": "too many requests are waiting; try again",
        "type": "rate_limit_error",
        "param": None,
        "code": "queue_full",
    }
    with pytest.raises(openai.RateLimitError):
        stepped.client().chat.completions.create(**chat_body(max_tokens=1))
    assert metric(stepped, "gemma_ft_queue_length") == 3 - engine.active
    engine.let(10)
    assert [one.result(PATIENCE).status for one in running] == [200] * 3
    assert stepped.chat(max_tokens=1).status == 200


@pytest.mark.parametrize(("limit", "tokens"), [(2048, 64 - 12), (5, 5)])
def test_without_max_tokens_an_answer_gets_what_fits(
    session: Session, engine: SteppedEngine, limit: int, tokens: int
) -> None:
    engine.let(100)
    with serving(replace(session, engine=engine), Limits(max_tokens=limit)) as served:
        reply = json.loads(served.chat().content)
    assert (reply["usage"]["completion_tokens"], reply["choices"][0]["finish_reason"]) == (tokens, "length")


def test_what_the_engine_refuses_is_no_failure(
    stepped: Served, engine: SteppedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(request: object) -> int:
        raise UserError("prompt: too long")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "submit", refuse)
        reply = stepped.chat(n=2)
        assert (reply.status, reply.error["message"], stepped.scheduler.open) == (400, "prompt: too long", 0)
    engine.let(3)  # the second answer may have come to the engine meanwhile, and have been given up in a step
    assert stepped.chat(max_tokens=1).status == 200


def test_more_answers_than_the_line_ever_takes(stepped: Served) -> None:
    reply = stepped.chat(n=4)
    assert (reply.status, reply.error["message"]) == (400, "4 answers in one request; this server takes up to 3")
    assert stepped.scheduler.open == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_dropped_before_the_next_step(
    stepped: Served, engine: SteppedEngine, stream: bool
) -> None:
    """Its engine is within a step when it leaves: that step is the last one that is spent on it."""
    body = json.dumps(chat_body(max_tokens=40, stream=stream, n=3)).encode()  # two run, one waits
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with contextlib.closing(socket.create_connection(stepped.address, timeout=PATIENCE)) as connection:
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        engine.let()
        for _ in range(2):  # the first step has been taken, the second is begun
            assert engine.asked.acquire(timeout=PATIENCE)
        if stream:
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
    wait_until(lambda: stepped.scheduler.open == 0)
    assert metric(stepped, "gemma_ft_cancelled_total") == 3
    engine.let()
    wait_until(lambda: len(engine.cancelled) == 3)
    assert (engine.steps, engine.active, engine.waiting) == (2, 0, 0)
    assert not engine.asked.acquire(blocking=False)


def test_one_that_waits_can_leave_too(
    stepped: Served, engine: SteppedEngine, later: Callable[..., Future[Reply]]
) -> None:
    running = [later(stepped.chat, max_tokens=2) for _ in range(2)]
    wait_until(lambda: stepped.scheduler.open == 2)
    client = stepped.client(timeout=0.2)
    with pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(**chat_body(max_tokens=5))
    wait_until(lambda: stepped.scheduler.open == 2)
    engine.let(10)
    assert [one.result(PATIENCE).status for one in running] == [200] * 2
    wait_until(lambda: engine.active == engine.waiting == 0)


def test_a_stop_string_frees_the_place_at_once(stepped: Served, engine: SteppedEngine) -> None:
    engine.let(2)
    reply = json.loads(stepped.chat(max_tokens=40, stop="aa").content)
    assert reply["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": "", "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert (engine.steps, engine.active, engine.cancelled) == (2, 0, [1])


def test_text_that_might_begin_a_stop_string_is_given_at_the_end(stepped: Served, engine: SteppedEngine) -> None:
    engine.let(3)
    stream = stepped.client().chat.completions.create(**chat_body(max_tokens=3, stop="aaaa", stream=True))
    pieces = [chunk.choices[0] for chunk in stream]
    assert [piece.delta.content for piece in pieces] == ["", "aaa", None]
    assert pieces[-1].finish_reason == "length"


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_takes_too_long_is_given_up(session: Session, engine: SteppedEngine, stream: bool) -> None:
    limits = Limits(max_batch=2, request_seconds=0.05)
    with serving(replace(session, engine=engine), limits) as served:
        try:
            reply = served.chat(max_tokens=5, stream=stream)
            last = reply.content if not stream else reply.content.split(b"data: ")[-1]
            assert json.loads(last)["error"] == {
                "message": "the answer took too long; ask for fewer tokens",
                "type": "server_error",
                "param": None,
                "code": "timeout",
            }
            assert reply.status == (200 if stream else 504)
            wait_until(lambda: served.scheduler.open == 0)
            wait_until(lambda: served.scheduler.health == "stalled")  # in one step for longer than a request may take
            reply = served.ask("GET", "/health")
            assert (reply.status, json.loads(reply.content)) == (503, {"status": "stalled"})
        finally:
            engine.let(10_000)


def test_a_failure_is_told_to_everybody_and_ends_the_server(
    stepped: Served, engine: SteppedEngine, later: Callable[..., Future[Reply]], capfd: pytest.CaptureFixture[str]
) -> None:
    """Whole answers, streamed ones, and who waits in line; then the server goes, so that it can be started afresh."""
    stopping = threading.Event()
    on_failure = stepped.scheduler.on_failure
    stepped.scheduler.on_failure = stopping.set  # the server itself is held for a moment, to look at it
    whole = [later(stepped.chat, max_tokens=5) for _ in range(2)]
    wait_until(lambda: stepped.scheduler.open == 2)
    streamed = later(stepped.chat, max_tokens=5, stream=True)
    wait_until(lambda: stepped.scheduler.open == 3)
    engine.fault = RuntimeError("/home/secret/path: CUDA error")
    engine.let()
    expected = {
        "message": "the engine has stopped; the server is going down",
        "type": "server_error",
        "param": None,
        "code": "engine_stopped",
    }
    for one in whole:
        assert (one.result(PATIENCE).status, one.result().error) == (500, expected)
    assert json.loads(streamed.result(PATIENCE).content.split(b"data: ")[-1])["error"] == expected
    assert stopping.wait(PATIENCE)
    reply = stepped.ask("GET", "/health")
    assert (reply.status, json.loads(reply.content)) == (503, {"status": "failed"})
    reply = stepped.chat()
    assert (reply.status, reply.error) == (503, expected)
    assert stepped.scheduler.failure is engine.fault
    on_failure()
    stepped.thread.join(PATIENCE)
    assert not stepped.thread.is_alive()
    assert capfd.readouterr() == ("", "")


def test_openais_client_sees_a_failure_within_a_stream(stepped: Served, engine: SteppedEngine) -> None:
    engine.let()
    stream = stepped.client().chat.completions.create(**chat_body(max_tokens=5, stream=True))
    assert next(stream).choices[0].delta.role == "assistant"
    assert next(stream).choices[0].delta.content == "a"
    engine.fault = RuntimeError("broken")
    engine.let()
    with pytest.raises(openai.APIError, match="the engine has stopped; the server is going down"):
        next(stream)


def test_a_fault_in_a_route_is_one_line_without_its_text(
    served: Served, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The exception may quote a prompt: neither the client nor the log is shown its text."""

    def broken(turns: object) -> None:
        raise KeyError("secret prompt")

    monkeypatch.setattr(type(served.scheduler), "check_room", lambda self, answers: broken(answers))
    reply = served.chat()
    assert (reply.status, reply.error["message"], reply.error["code"]) == (500, "internal error", "internal_error")
    line = "a fault of gemma-ft: KeyError at /v1/chat/completions (GEMMA_FT_DEBUG=1 shows the traceback)\n"
    assert capfd.readouterr() == ("", line)


def test_running_answers_are_waited_for_at_the_end(session: Session, engine: SteppedEngine) -> None:
    with serving(replace(session, engine=engine), Limits(max_batch=2)) as served, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(served.chat, max_tokens=2)
        wait_until(lambda: served.scheduler.open == 1)
        served.server.should_exit = True
        wait_until(lambda: not any(one.is_serving() for one in served.server.servers))
        with pytest.raises(ConnectionError):
            served.ask("GET", "/health")
        engine.let(10_000)
        assert answer.result(PATIENCE).status == 200
        served.thread.join(PATIENCE)
        assert not served.thread.is_alive()


def test_an_answer_that_does_not_end_is_cut_at_the_end(
    session: Session, engine: SteppedEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    limits = Limits(max_batch=2, shutdown_seconds=0)
    with serving(replace(session, engine=engine), limits) as served:
        stream = served.client().chat.completions.create(**chat_body(max_tokens=5, stream=True))
        assert next(stream).choices[0].delta.role == "assistant"
        served.server.should_exit = True
        with pytest.raises(openai.APIConnectionError):
            next(stream)
        engine.let(10_000)
        served.thread.join(PATIENCE)
        assert not served.thread.is_alive()
    assert capfd.readouterr() == ("", "")


def test_no_system_message_where_none_was_trained(session: Session) -> None:
    strict = replace(session, encoder=ChatEncoder(session.tokenizer, "error"))
    with serving(strict) as served:
        reply = served.chat(messages=[{"role": "system", "content": "x"}, {"role": "user", "content": "Hello"}])
        assert reply.status == 400
        assert reply.error["message"] == "messages.0: this model was trained without system messages and takes none"
        assert reply.error["param"] == "messages.0"


@pytest.mark.parametrize(
    ("name", "base", "served_as"),
    [("google/gemma-2-2b-it", "google/gemma-2-2b-it", "google/gemma-2-2b-it"), ("/x/runs/mine/", "/x/base", "mine"),
     ("runs/mine", "google/gemma-2-2b", "mine")],
)  # fmt: skip
def test_a_model_is_served_under_its_hub_id_or_its_folders_name(
    session: Session, name: str, base: str, served_as: str
) -> None:
    place = replace(session.place, base=Source(base, None))
    assert served_id(replace(session, name=name, place=place)) == served_as
    assert served_id(session) == MODEL
