"""Prompts and answers that do not fit, told so that clients know an overflow when they see one."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from gemma_ft.infer.session import Session
from gemma_ft.serve.errors import ApiFault
from gemma_ft.serve.limits import Limits
from gemma_ft.serve.room import answer_room
from tests.serve.conftest import MODEL, Served, chat_body

OVERFLOW = "context_length_exceeded"


def known_as_overflow(text: str) -> bool:
    """What litellm 1.98 looks for (ExceptionCheckers.is_error_str_context_window_exceeded); OpenAI's API and vLLM's
    say it.
    """
    return "this model's maximum context length is" in text.lower()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "fields", "param", "told"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": "word " * 3000}]}, "messages",
         "However, your messages resulted in 9011 tokens and left no room for an answer. "
         "Please reduce the length of the messages."),
        ("chat/completions", {"max_tokens": 2048}, "max_tokens",
         "However, you requested 2060 tokens (12 in the messages, 2048 in the completion). "
         "Please reduce the length of the messages or max_tokens."),
        ("chat/completions", {"max_completion_tokens": 100_000}, "max_completion_tokens",
         "However, you requested 100012 tokens (12 in the messages, 100000 in the completion). "
         "Please reduce the length of the messages or max_completion_tokens."),
        ("completions", {"prompt": "word " * 3000}, "prompt",
         "However, your prompt resulted in 9002 tokens and left no room for an answer. "
         "Please reduce the length of the prompt."),
        ("completions", {"prompt": ["a", "word " * 3000]}, "prompt.1",
         "However, your prompt resulted in 9002 tokens and left no room for an answer. "
         "Please reduce the length of the prompt."),
        ("completions", {"prompt": "a", "max_tokens": 2047}, "max_tokens",
         "However, you requested 2049 tokens (2 in the prompt, 2047 in the completion). "
         "Please reduce the length of the prompt or max_tokens."),
    ],
)  # fmt: skip
def test_an_overflow_is_told_in_openais_words(
    served: Served, path: str, fields: dict[str, Any], param: str, told: str, stream: bool
) -> None:
    """In streams too, before they begin."""
    body = chat_body() if path.startswith("chat") else {"model": MODEL}
    reply = served.ask("POST", f"/v1/{path}", {**body, **fields, "stream": stream})
    assert reply.status == 400
    assert reply.error == {
        "message": f"This model's maximum context length is 2048 tokens. {told}",
        "type": "invalid_request_error",
        "param": param,
        "code": OVERFLOW,
    }
    assert known_as_overflow(reply.error["message"])


def test_openais_client_has_the_code(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.client().completions.create(model=MODEL, prompt="a " * 2048)
    assert (caught.value.code, caught.value.param) == (OVERFLOW, "prompt")


def test_what_is_no_overflow_is_not_told_as_one(served: Served, session: Session) -> None:
    """An answer that fits the context and not this server's limit, and other refusals."""
    with pytest.raises(ApiFault) as caught:
        answer_room(12, 4096, context=8192, limits=Limits(), prompt_at="messages", asked_at="max_tokens")
    fault = caught.value
    assert (fault.message, fault.param, fault.code) == (
        "max_tokens: this server gives up to 2048 for one answer", "max_tokens", None
    )  # fmt: skip
    for fields in ({"max_tokens": 0}, {"n": 9}, {"messages": []}, {"stop": "a" * 300}):
        reply = served.chat(**fields)
        assert (reply.status, reply.error["code"]) == (400, None)
        assert not known_as_overflow(reply.error["message"])


@pytest.mark.parametrize(
    ("prompt_tokens", "asked", "room"),
    [(12, None, 2048), (8191, None, 1), (6144, 2048, 2048), (12, 2048, 2048), (8180, 12, 12), (8000, None, 192)],
)
def test_what_fits_has_its_room(prompt_tokens: int, asked: int | None, room: int) -> None:
    limits = Limits()
    found = answer_room(prompt_tokens, asked, context=8192, limits=limits, prompt_at="prompt", asked_at="max_tokens")
    assert found == room
