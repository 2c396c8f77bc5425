"""Bodies as clients send them: what changes no text is taken, nulls are as absent, and each refusal names its field."""

from __future__ import annotations

import json
from typing import Any, get_type_hints

import pytest
from openai.types import chat, completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from gemma_ft.data.conversation import Turn
from gemma_ft.serve.errors import ApiFault
from gemma_ft.serve.limits import Limits
from gemma_ft.serve.schema import ChatRequest, CompletionRequest, parsed
from tests.serve.conftest import MODEL, Served, chat_body

USER = {"role": "user", "content": "Hello"}
PLAIN = [Turn("user", "Hello")]


def asked(**fields: Any) -> ChatRequest:
    return parsed(ChatRequest, json.dumps(chat_body(**fields)).encode(), Limits())


def refused(kind: Any = ChatRequest, **fields: Any) -> ApiFault:
    body = chat_body() if kind is ChatRequest else {"model": MODEL, "prompt": "a"}
    with pytest.raises(ApiFault) as caught:
        parsed(kind, json.dumps({**body, **fields}).encode(), Limits()).turns()  # type: ignore[union-attr]
    assert caught.value.status == 400
    return caught.value


def parts(*texts: str, **beside: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text, **beside} for text in texts]


@pytest.mark.parametrize(
    "silent",
    [
        {"role": "assistant", "content": None},
        {"role": "assistant"},  # as model_dump(exclude_none=True) has it
        {"role": "assistant", "content": []},
        {"role": "assistant", "content": None, "tool_calls": None, "function_call": None, "refusal": None},
    ],
)
def test_an_assistant_may_have_said_nothing(silent: dict[str, Any]) -> None:
    """openai 3.57, ChatCompletionAssistantMessageParam: content may be null; it is as empty."""
    plain = asked(messages=[USER, {"role": "assistant", "content": ""}, USER])
    assert asked(messages=[USER, silent, USER]).turns() == plain.turns()


def test_an_assistant_that_said_nothing_is_answered(served: Served) -> None:
    """Over the wire, and as an empty content is."""
    replies = [
        json.loads(
            served.chat(
                messages=[USER, {"role": "assistant", "content": said}, {"role": "user", "content": "And?"}],
                max_tokens=3,
                temperature=0,
            ).content
        )
        for said in (None, "")
    ]
    assert replies[0]["choices"] == replies[1]["choices"]
    assert replies[0]["usage"] == replies[1]["usage"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content: is null, expected text"),
        ({"messages": [{"role": "system", "content": None}, USER]}, "messages.0.content: is null, expected text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
         "messages.0.content.0.text: is null, expected text"),
        ({"messages": [{"role": None, "content": "a"}]},
         "messages.0.role: is null, expected 'system', 'developer', 'user' or 'assistant'"),
        ({"messages": [None]}, "messages.0: is null, expected an object"),
        ({"messages": None}, "messages: is null, expected a valid array"),
        ({"model": None}, "model: is null, expected a valid string"),
        ({"stop": [None]}, "stop.0: is null, expected a valid string"),
    ],
)  # fmt: skip
def test_a_null_where_something_is_needed_is_told_as_one(fields: dict[str, Any], message: str) -> None:
    fault = refused(**fields)
    assert (fault.message, fault.param) == (message, message.partition(": ")[0])


@pytest.mark.parametrize(
    "beside",
    [
        {"cache_control": None, "annotations": None},
        {"image_url": None, "input_audio": None, "file": None},
        {"cache_control": {"type": "ephemeral"}},
        {"prompt_cache_breakpoint": {"mode": "explicit", "ttl": "30m"}},
        {"annotations": [], "logprobs": []},
    ],
)
def test_a_text_part_may_carry_what_changes_no_text(beside: dict[str, Any]) -> None:
    content = parts("Be kind.", "Hello", **beside)
    assert asked(messages=[{"role": "user", "content": content}]).turns() == [Turn("user", "Be kind.\nHello")]


CLIENTS: dict[str, dict[str, Any]] = {
    "openai, what took the place of user": {
        "prompt_cache_key": "a", "safety_identifier": "a", "prompt_cache_retention": "24h", "metadata": {"a": "b"},
        "stream": True, "stream_options": {"include_usage": True, "include_obfuscation": True},
    },
    "openai, all neutral": {
        "n": 1, "logprobs": False, "top_logprobs": None, "store": False, "service_tier": "auto", "tools": [],
        "tool_choice": "none", "parallel_tool_calls": True, "response_format": {"type": "text", "json_schema": None},
        "modalities": ["text"], "verbosity": "medium", "reasoning_effort": None, "logit_bias": {}, "user": "ben",
    },
    "vllm": {
        "add_generation_prompt": True, "continue_final_message": False, "ignore_eos": False, "min_tokens": 0,
        "skip_special_tokens": True, "spaces_between_special_tokens": False, "chat_template_kwargs": {}, "top_k": -1,
        "stop_token_ids": [], "bad_words": [], "include_stop_str_in_output": False, "guided_json": None, "echo": False,
        "add_special_tokens": False, "repetition_penalty": 1.0, "length_penalty": 1.0, "priority": 0,
    },
    "llama.cpp's own page": {
        "cache_prompt": True, "samplers": "", "dynatemp_range": 0, "dynatemp_exponent": 1, "xtc_probability": 0,
        "xtc_threshold": 0.1, "typ_p": None, "typical_p": 1, "repeat_last_n": 64, "repeat_penalty": 1,
        "presence_penalty": 0, "frequency_penalty": 0, "dry_multiplier": 0, "dry_base": 1.75, "dry_allowed_length": 2,
        "dry_penalty_last_n": -1, "max_tokens": -1, "timings_per_token": False, "reasoning_format": "auto",
        "stream": True,
    },
    "LM Studio's example": {"temperature": 0.7, "max_tokens": -1, "stream": True},
    "a template's switch": {"chat_template_kwargs": {"enable_thinking": False}},
    "litellm": {"stream": False, "n": 1, "user": "", "max_tokens": 5, "metadata": {}, "parallel_tool_calls": None},
    "langchain": {"temperature": 0.2, "n": 1, "stream": False, "stop": None, "logprobs": False, "seed": None},
    "LibreChat": {
        "temperature": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "user": "64f0", "stream": True,
        "stop": [],
    },
    "Open WebUI": {
        "stream": True, "stream_options": {"include_usage": True}, "seed": -1, "stop": ["###"], "top_k": 40,
        "min_p": 0.0, "max_tokens": 128, "frequency_penalty": 0, "logit_bias": None,
    },
    "LangChain.js in n8n": {
        "temperature": 0.7, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "n": 1, "stream": True,
        "max_tokens": -1, "stream_options": {"include_usage": True}, "user": "n8n", "stop": None,
    },
    "SillyTavern": {
        "stream": True, "temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0, "typical_p": 1, "tfs_z": 1,
        "repeat_penalty": 1, "repeat_last_n": 0, "mirostat": 0, "mirostat_tau": 5, "mirostat_eta": 0.1,
        "dry_multiplier": 0, "dry_base": 1.75, "dry_sequence_breakers": ["\n", ":"], "logit_bias": [], "grammar": "",
        "cache_prompt": True, "samplers": [], "seed": -1, "ignore_eos": False, "n_probs": 0, "min_keep": 0,
    },
    "Cline": {
        "messages": [{"role": "user", "content": parts("Hello", cache_control={"type": "ephemeral"})}],
        "temperature": 0, "max_tokens": -1, "stream": True, "stream_options": {"include_usage": True},
    },
    "pydantic-ai": {"stream": False, "tool_choice": "none", "tools": [], "parallel_tool_calls": None, "top_p": None},
    "Dify": {"stream": True, "temperature": 0.3, "user": "cdc1", "stop": [], "response_format": {"type": "text"}},
    "continue": {
        "max_tokens": 64, "temperature": 0, "stream": True, "presence_penalty": None, "prediction": None,
        "tools": None, "parallel_tool_calls": False,
    },
    "zed": {
        "messages": [{"role": "user", "content": parts("Hello")}], "stream": True, "stop": [], "temperature": 1.0,
        "max_completion_tokens": 99, "tools": [], "prompt_cache_key": "6f2d", "parallel_tool_calls": False,
        "stream_options": {"include_usage": True},
    },
}  # fmt: skip


@pytest.mark.parametrize("client", CLIENTS)
def test_what_clients_always_send_is_taken(client: str) -> None:
    assert asked(**CLIENTS[client]).turns() == PLAIN


@pytest.mark.parametrize(
    "said",
    [
        {"role": "assistant", "content": "Hi", "reasoning_content": "", "id": "msg_1"},
        {"role": "assistant", "content": "Hi", "refusal": None, "annotations": [], "audio": None, "tool_calls": []},
        {"role": "assistant", "content": "Hi", "provider_specific_fields": {"refusal": None}, "thinking_blocks": []},
        {"role": "assistant", "content": parts("Hi", annotations=[]), "reasoning": "", "reasoning_details": []},
        {
            "role": "assistant",
            "content": "Hi",
            "id": 1947,
            "finish_reason": "stop",
            "timestamp": 1.5,
            "usage": {"a": 1},
        },
        {"role": "assistant", "content": "Hi", "prefix": False, "cache_control": {"type": "ephemeral"}, "name": ""},
    ],
)
def test_an_answer_may_be_sent_back_as_it_came(said: dict[str, Any]) -> None:
    assert asked(messages=[USER, said, USER]).turns() == [*PLAIN, Turn("assistant", "Hi"), *PLAIN]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"verbosity": "high"}, "verbosity"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"moderation": {"model": "a"}}, "moderation"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"add_special_tokens": True}, "add_special_tokens"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
        ({"guided_json": {}}, "guided_json"),
        ({"repeat_penalty": 1.1}, "repeat_penalty"),
        ({"grammar": "root ::= x"}, "grammar"),
        ({"n_predict": 5}, "n_predict"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
        ({"messages": [{**USER, "name": "Ben"}]}, "messages.0.name"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{}]}, USER]}, "messages.1.tool_calls"),
        ({"messages": [USER, {"role": "assistant", "content": "a", "reasoning_content": "b"}, USER]},
         "messages.1.reasoning_content"),
        ({"messages": [{"role": "user", "content": parts("a", citations=[{}])}]}, "messages.0.content.0.citations"),
    ],
)  # fmt: skip
def test_what_asks_for_something_is_still_refused(fields: dict[str, Any], param: str) -> None:
    """And is told as a field that is known."""
    fault = refused(**fields)
    assert (fault.message, fault.param) == (f"{param}: not supported by this server; leave it out", param)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_cache_kye": "a"}, "prompt_cache_kye: unknown field"),
        ({"messages": [{**USER, "contents": "a"}]}, "messages.0.contents: unknown field"),
        ({"messages": [{"role": "user", "content": parts("a", texts="b")}]},
         "messages.0.content.0.texts: unknown field"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage: unknown field"),
        ({"user": 5}, "user: expected text, got a number"),
        ({"metadata": "a"}, "metadata: expected an object, got text"),
        ({"cache_prompt": 1}, "cache_prompt: expected true or false, got a number"),
        ({"repeat_last_n": True}, "repeat_last_n: expected a number, got true or false"),
        ({"max_tokens": 5, "max_completion_tokens": 5},
         "max_completion_tokens: max_tokens is another name of it; give one"),
        ({"max_tokens": -2}, "max_tokens: Input should be greater than or equal to 1"),
        ({"max_completion_tokens": 0}, "max_completion_tokens: Input should be greater than or equal to 1"),
    ],
)  # fmt: skip
def test_a_slip_is_told_where_it_is(fields: dict[str, Any], message: str) -> None:
    fault = refused(**fields)
    assert (fault.message, fault.param) == (message, message.partition(": ")[0])


SYSTEM, ANSWER = {"role": "system", "content": "Be kind."}, {"role": "assistant", "content": "Hi"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([SYSTEM], "messages: a system message alone asks nothing; add one of the user's"),
        ([{**SYSTEM, "role": "developer"}], "messages: a system message alone asks nothing; add one of the user's"),
        ([USER, USER], "messages.1: user and assistant must alternate, got user after user"),
        (
            [SYSTEM, USER, ANSWER, ANSWER],
            "messages.3: user and assistant must alternate, got assistant after assistant",
        ),
        ([SYSTEM, SYSTEM, USER], "messages.1: a system turn can only come first"),
        ([USER, SYSTEM], "messages.1: a system turn can only come first"),
        ([ANSWER, USER], "messages.0: a conversation starts with a user turn, got assistant"),
        ([SYSTEM, ANSWER], "messages.1: a conversation starts with a user turn, got assistant"),
        ([USER, ANSWER], "messages.1: the last one must be the user's; an answer that was begun is not continued"),
        ([USER, ANSWER, {**USER, "content": " "}], "messages.2.content: the last one is empty; ask something"),
    ],
)
def test_turns_are_counted_as_messages_are(messages: list[dict[str, str]], message: str) -> None:
    fault = refused(messages=messages)
    assert (fault.message, fault.param) == (message, message.partition(": ")[0])


def test_system_user_and_assistant_in_turn_are_taken() -> None:
    assert len(asked(messages=[SYSTEM, USER, ANSWER, USER]).turns()) == 4


@pytest.mark.parametrize(
    ("kind", "types"),
    [
        (ChatRequest, chat_create_params.CompletionCreateParamsStreaming),
        (CompletionRequest, completion_create_params.CompletionCreateParamsStreaming),
    ],
)
def test_every_field_of_openais_api_is_known(kind: Any, types: Any) -> None:
    """Fails with a newer client that has a field of which nothing is known here."""
    for name in get_type_hints(types):
        assert "unknown field" not in refused(kind, **{name: [["no"]]}).message, name
    for message in (chat.ChatCompletionUserMessageParam, chat.ChatCompletionAssistantMessageParam):
        for name in get_type_hints(message):
            assert "unknown field" not in refused(messages=[{**USER, name: [["no"]]}]).message, name
    for name in get_type_hints(chat.ChatCompletionContentPartTextParam):
        fault = refused(messages=[{"role": "user", "content": [{"type": "text", "text": "a", name: [["no"]]}]}])
        assert "unknown field" not in fault.message, name
