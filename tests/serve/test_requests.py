"""What a body may say: all that is done, nothing that would be ignored, and no body that takes the server down."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_ft.serve.errors import ApiFault
from gemma_ft.serve.fields import AS_ABSENT, IN_CHATS, IN_COMPLETIONS
from gemma_ft.serve.limits import Limits
from gemma_ft.serve.schema import ChatRequest, CompletionRequest, parsed
from tests.serve.conftest import MODEL, Served, chat_body

USER = {"role": "user", "content": "Hello"}


def fault_of(content: bytes, kind: Any = ChatRequest) -> ApiFault | None:
    try:
        request = parsed(kind, content, Limits())
        request.sampling(0)
        if kind is ChatRequest:
            request.turns()
    except ApiFault as fault:
        return fault
    return None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"frequency_penalty": 0.1}, "frequency_penalty: not supported by this server; leave it out"),
        ({"presence_penalty": -1}, "presence_penalty: not supported by this server; leave it out"),
        ({"logprobs": True}, "logprobs: not supported by this server; leave it out"),
        ({"logprobs": 0}, "logprobs: not supported by this server; leave it out"),
        ({"tools": [{"type": "function"}]}, "tools: not supported by this server; leave it out"),
        ({"tool_choice": "required"}, "tool_choice: not supported by this server; leave it out"),
        ({"response_format": {"type": "json_object"}}, "response_format: not supported by this server; leave it out"),
        ({"logit_bias": {"1": 5}}, "logit_bias: not supported by this server; leave it out"),
        ({"store": True}, "store: not supported by this server; leave it out"),
        ({"best_of": 2}, "best_of: not supported by this server; leave it out"),
        ({"temprature": 0}, "temprature: unknown field"),
        ({"temperature": "0"}, "temperature: Input should be a valid number"),
        ({"temperature": -1}, "temperature: expected 0 to 100, got -1.0"),
        ({"top_p": 1.5}, "top_p: expected 0 to 1, got 1.5"),
        ({"top_k": 1.5}, "top_k: Input should be a valid integer"),
        ({"seed": -2}, "seed: expected a whole number from 0 to 9223372036854775807, got -2"),
        ({"n": 9}, "n: expected 1 to 8"),
        ({"n": 0}, "n: Input should be greater than or equal to 1"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"max_tokens": True}, "max_tokens: Input should be a valid integer"),
        ({"max_tokens": 5, "max_completion_tokens": 5},
         "max_completion_tokens: max_tokens is another name of it; give one"),
        ({"stop": ["a"] * 5}, "stop: expected up to 4 strings"),
        ({"stop": ""}, "stop: expected strings of 1 to 256 characters"),
        ({"stop": [1]}, "stop.0: Input should be a valid string"),
        ({"stream": "yes"}, "stream: Input should be a valid boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options: only with stream: true"),
        ({"model": None}, "model: is null, expected a valid string"),
        ({"messages": []}, "messages: List should have at least 1 item after validation, not 0"),
        ({"messages": [{"role": "tool", "content": "x"}]},
         "messages.0.role: Input should be 'system', 'developer', 'user' or 'assistant'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: is a number, expected text"),
        ({"messages": [{"role": "user", "content": "a\0"}]},
         "messages.0.content: the text holds a NUL character; is the file damaged, or not UTF-8?"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages.0.content.0.type: invalid content type: image_url is only supported by certain models; send text: "
         '{"type": "text", "text": ...}'),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
         "messages.0.content.0.type: invalid content type: input_audio is only supported by certain models; send text: "
         '{"type": "text", "text": ...}'),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]},
         'messages.0.content.0: only text parts are taken: {"type": "text", "text": ...}'),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
         "messages.0.content.0.text: is a number, expected text"),
        ({"messages": [USER, {"role": "assistant", "content": "x", "tool_calls": [{}]}, USER]},
         "messages.1.tool_calls: not supported by this server; leave it out"),
        ({"messages": [{**USER, "name": "Ben"}]}, "messages.0.name: not supported by this server; leave it out"),
        ({"messages": [USER, {"role": "assistant", "content": "He"}]},
         "messages.1: the last one must be the user's; an answer that was begun is not continued"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages.0.content: the last one is empty; ask something"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_chat_that_is_refused(fields: dict[str, Any], message: str) -> None:
    fault = fault_of(json.dumps(chat_body(**fields)).encode())
    assert fault is not None
    assert (fault.status, fault.message) == (400, message)
    assert fault.param == message.partition(": ")[0]  # each names its field


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1, 2], "prompt: token ids are not taken; send text"),
        ([[1, 2]], "prompt: token ids are not taken; send text"),
        ([], "prompt: the list is empty; give a text"),
        ({"a": 1}, "prompt: is an object, expected text"),
        (None, "prompt: is null, expected text"),
        (["a", None], "prompt.1: is null, expected text"),
    ],
)
def test_a_completion_that_is_refused(prompt: Any, message: str) -> None:
    fault = fault_of(json.dumps({"model": MODEL, "prompt": prompt}).encode(), CompletionRequest)
    assert fault is not None
    assert (fault.status, fault.message) == (400, message)
    assert fault.param == message.partition(": ")[0]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": "m"} x', b"[" * 100_000, b'{"a":' * 5000, b'"\\ud800"'],
    ids=repr,
)
def test_what_is_no_request(content: bytes) -> None:
    fault = fault_of(content)
    assert fault is not None
    assert fault.status == 400
    assert "\n" not in fault.message


def test_half_a_character_and_numbers_beyond_all_bounds() -> None:
    for content in (
        b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
        json.dumps(chat_body()).encode()[:-1] + b', "temperature": 1e999}',
        json.dumps(chat_body()).encode()[:-1] + b', "temperature": NaN}',
        json.dumps(chat_body()).encode()[:-1] + b', "seed": ' + b"9" * 4000 + b"}",
        json.dumps(chat_body()).encode()[:-1] + b', "temperature": ' + b"9" * 4000 + b"}",
        json.dumps(chat_body()).encode()[:-1] + b', "frequency_penalty": ' + b"9" * 4000 + b"}",
    ):
        fault = fault_of(content)
        assert fault is not None
        assert fault.status == 400, fault.message


def examples(harmless: Any) -> list[Any]:
    """Values that ask for nothing."""
    of_types = {str: ["a", ""], dict: [{"a": "b"}], bool: [True, False], float: [0, 2.5], list: [["a"]]}
    return of_types[harmless] if isinstance(harmless, type) else list(harmless)


@pytest.mark.parametrize(("kind", "table"), [(ChatRequest, IN_CHATS), (CompletionRequest, IN_COMPLETIONS)])
def test_what_asks_for_nothing_is_taken(kind: Any, table: Any) -> None:
    body = chat_body() if kind is ChatRequest else {"model": MODEL, "prompt": "a"}
    done = {name: values for name, values in AS_ABSENT.items() if name in kind.model_fields}
    for field, harmless in {**table, **done}.items():
        for value in (None, *examples(harmless)):
            assert fault_of(json.dumps({**body, field: value}).encode(), kind) is None, (field, value)
    assert fault_of(json.dumps({**body, "max_tokens": None, "stop": None, "nobody_knows": None}).encode(), kind) is None


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, *IN_CHATS, "x"})
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", 1]), "content": ANYTHING}),
    max_size=3,
)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=4), MESSAGES | ANYTHING)
def test_no_body_is_more_than_refused(fields: dict[str, Any], messages: Any) -> None:
    """Whatever JSON can say: a request, or one line with status 400."""
    body = json.dumps({**chat_body(), "messages": messages, **fields}).encode()
    for kind in (ChatRequest, CompletionRequest):
        fault = fault_of(body, kind)
        assert fault is None or (fault.status == 400 and "\n" not in fault.message)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_bad_bodies_over_the_wire(served: Served, path: str, capfd: pytest.CaptureFixture[str]) -> None:
    """An error object each, no trace and no path in it, and a server that goes on."""
    bad: list[Any] = [b"", b"{", b"\x00\xff", b"[" * 200_000, b'{"model": {}}', {}, [], {"model": MODEL}, b"a" * 999]
    bad += [chat_body(messages=value) for value in ("x", [1], [[]], [{}], {"role": "user"}, None)]
    bad += [{"model": MODEL, "prompt": value} for value in (1, None, [None], {"a": []})]
    bad += [chat_body(messages=[USER, USER]), chat_body(messages=[USER, {"role": "system", "content": "late"}])]
    for body in bad:
        reply = served.ask("POST", path, body)
        assert reply.status == 400, (body, reply)
        assert set(reply.error) == {"message", "type", "param", "code"}
        assert reply.error["type"] == "invalid_request_error"
        for forbidden in ("Traceback", "/", "pydantic", "gemma_ft"):
            assert forbidden not in reply.error["message"], reply.error
    assert served.chat(max_tokens=1).status == 200
    assert capfd.readouterr() == ("", "")


def test_the_order_of_turns_is_explained(served: Served) -> None:
    reply = served.chat(messages=[USER, USER])
    assert reply.error["message"] == "messages.1: user and assistant must alternate, got user after user"
    assert (reply.status, reply.error["param"]) == (400, "messages.1")


def test_another_model_is_not_served(served: Served) -> None:
    reply = served.chat(model="gpt-4")
    assert (reply.status, reply.error["code"], reply.error["param"]) == (404, "model_not_found", "model")
    assert reply.error["message"] == "no such model here; this server serves 'gemma-tiny'"
