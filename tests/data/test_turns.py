"""Shapes that rows of other tools have: read where they say one thing alone, else refused with what to do."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gemma_ft.data.conversation import Conversation
from gemma_ft.data.read.detect import detect_format
from gemma_ft.data.read.parse_rows import parse_rows
from gemma_ft.data.read.sources import Row
from gemma_ft.errors import DataError
from gemma_ft.families.records import GEMMA_3

TURNS = [{"role": "user", "content": "It's a?"}, {"role": "assistant", "content": "b \u00e9\n"}]
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
ONE_CHAT = 'write each chat as one row, {"messages": [{"role": "user", "content": "..."}, ...]}'
UNMAPPED = f"which data.columns cannot map; {ONE_CHAT}"
OR_TEXT = ", or set data.format: text to learn each alone as text"


def said(fields: dict[str, Any], **arguments: Any) -> list[tuple[str, str]]:
    (item,) = parse_rows([Row("a.jsonl:1", fields)], **arguments)
    assert isinstance(item, Conversation)
    assert item.unread == ()
    return [(turn.role, turn.content) for turn in item.turns]


def refusal(fields: dict[str, Any], **arguments: Any) -> str:
    with pytest.raises(DataError) as caught:
        parse_rows([Row("a.jsonl:1", fields)], **arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "turns", "format"),
    [("messages", TURNS, "messages"), ("conversations", SHAREGPT, "sharegpt"), ("messages", SHAREGPT, "sharegpt")],
)
@pytest.mark.parametrize("write", [json.dumps, str], ids=["JSON", "as Python prints it"])
def test_a_list_of_turns_as_text_is_read(name: str, turns: list[Any], format: str, write: Any) -> None:
    """pandas 3.1.1 writes a column of lists as Python prints them; a3dff15: no known format has the fields messages."""
    fields = {name: write(turns)}
    assert detect_format([Row("a.jsonl:1", fields)])[0] == format
    assert said(fields) == said({name: turns})
    assert said({"x": write(turns)}, columns={"messages": "{x}"}) == said({name: turns})


@pytest.mark.parametrize(
    "text",
    ["hello", "[{'role': 'user', 'content': 'a'}\n {'role': 'assistant'}]", "[__import__('os')]", "[" * 5000, "[{1}]"],
)
def test_other_text_is_no_list_of_turns(text: str) -> None:
    assert refusal({"messages": text}) == f"a.jsonl: 'messages' is text, and no list of turns in JSON; {ONE_CHAT}"
    assert refusal({"messages": text}, format="messages") == (
        "a.jsonl:1: expected a list of turns in 'messages', got text that is no list in JSON"
    )


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert said({"messages": [{"role": "user", "content": parts}, TURNS[1]]})[0] == ("user", "a\nb")
    assert said({"messages": [{"role": "user", "content": [{"text": "a"}]}, TURNS[1]]})[0] == ("user", "a")
    assert said({"prompt": parts, "completion": "c"}) == [("user", "a\nb"), ("assistant", "c")]


def test_text_parts_are_one_text_as_the_family_has_it() -> None:
    """Gemma 3's published template writes each part without its outer white space, and nothing between them."""
    parts = [{"type": "text", "text": " a\n"}, {"type": "text", "text": "b"}]
    chats = ({"messages": [{"role": "user", "content": parts}, TURNS[1]]}, {"prompt": parts, "completion": "c"},
             {"system": parts, "messages": TURNS})  # fmt: skip
    for chat in chats:
        assert said(chat)[0][1] == " a\n\nb"
        assert said(chat, chat=GEMMA_3.chat)[0][1] == "ab"


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "image"}, "'content[1]' is a part of the kind 'image'; only text"),
        ({"type": "input_audio", "input_audio": {}}, "'content[1]' is a part of the kind 'input_audio'; only text"),
        ({"type": "image_url", "image_url": {}}, "'content[1]' is a part of the kind 'image_url'; only text"),
        ({"type": "thinking", "thinking": "b"}, "'content[1]' is a part of the kind 'thinking'; only text"),
        ({"image": "b"}, "'content[1]' is a part of the kind 'image'; only text"),
    ],
)
def test_other_parts_are_refused(part: dict[str, Any], reason: str) -> None:
    fields = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}, TURNS[1]]}
    assert refusal(fields) == f"a.jsonl:1: turn 1: {reason} can be trained; take the row out"


@pytest.mark.parametrize(
    ("role", "expected"), [("developer", "system"), ("human", "user"), ("gpt", "assistant"), ("model", "assistant")]
)
def test_roles_have_their_other_names(role: str, expected: str) -> None:
    turns = {
        "system": [{"role": role, "content": "s"}, *TURNS],
        "user": [{"role": role, "content": "a"}, TURNS[1]],
        "assistant": [TURNS[0], {"role": role, "content": "b"}],
    }[expected]
    roles = [one for one, _ in said({"messages": turns})]
    assert roles == {"system": ["system", "user", "assistant"]}.get(expected, ["user", "assistant"])


def test_prompt_and_completion_may_be_lists_of_turns() -> None:
    """As in TRL 1.16.0 (completion_only_loss): the completion is trained, answers in the prompt are not."""
    before = [{"role": "system", "content": "s"}, *TURNS]
    fields = {"prompt": [*before, {"role": "user", "content": "c"}], "completion": [TURNS[1]]}
    assert said(fields) == said({"messages": [*before, {"role": "user", "content": "c"}, TURNS[1]]})
    (item,) = parse_rows([Row("a.jsonl:1", fields)])
    assert isinstance(item, Conversation)
    assert [turn.train for turn in item.turns if turn.role == "assistant"] == [False, True]
    assert said({"prompt": "a", "completion": [TURNS[1]]}) == [("user", "a"), ("assistant", "b \u00e9\n")]
    assert said({"prompt": TURNS[:1], "completion": "d"}) == [("user", "It's a?"), ("assistant", "d")]


def test_preferences_may_have_lists_of_turns() -> None:
    chosen, rejected = TURNS[1:], [{"role": "assistant", "content": "c"}]
    expected = [("user", "It's a?"), ("assistant", "b \u00e9\n")]
    assert said({"prompt": TURNS[:1], "chosen": chosen, "rejected": rejected}) == expected
    assert said({"prompt": "It's a?", "chosen": chosen[0], "rejected": rejected[0]}) == expected
    assert said({"prompt": "It's a?", "chosen": TURNS, "rejected": TURNS[:1] + rejected}) == expected


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"chosen": TURNS[1:], "rejected": [{"role": "assistant", "content": "c"}]}, "chosen, rejected"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
            "chosen, rejected",  # as Anthropic/hh-rlhf is published
        ),
        ({"question": "a", "chosen": "b", "rejected": "c"}, "question, chosen, rejected"),
    ],
)
def test_preferences_without_a_prompt_name_the_cure(fields: dict[str, Any], names: str) -> None:
    """a3dff15 told the fields, and not what to do."""
    cure = "map it with data.columns.prompt, or give whole chats, as lists of turns, in 'chosen' and 'rejected'"
    assert refusal(fields) == f"a.jsonl:1: no field 'prompt'; the row has {names}; {cure}"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"title": "t", "mapping": {"a": {"message": None}}, "current_node": "a"},
            f"the rows are an export of ChatGPT (mapping: a tree of messages), {UNMAPPED}",
        ),
        (
            {"uuid": "u", "name": "n", "chat_messages": [{"sender": "human", "text": "a"}]},
            f"the rows are an export of Claude (chat_messages), {UNMAPPED}",
        ),
        (
            {"contents": [{"role": "user", "parts": [{"text": "a"}]}]},
            f"the rows are of Gemini's API (contents with parts), {UNMAPPED}",
        ),
        (
            {"message_id": "m", "parent_id": None, "role": "prompter", "text": "a"},
            f"each row is one message (role, text); {ONE_CHAT}{OR_TEXT}",
        ),
        (
            {"role": "assistant", "content": "a"},
            f"each row is one message (role, content); {ONE_CHAT}{OR_TEXT}",
        ),
        (
            {"messages": [{"speaker": "a", "words": "b"}]},
            "'messages' is a list whose first element is an object with speaker, words, expected a turn with role and "
            f"content, or from and value; {ONE_CHAT}",
        ),
        ({"messages": {"a": 1}}, f"'messages' is an object, expected a list of turns; {ONE_CHAT}"),
        (
            {"ask": "a", "say": "b"},
            "no known format has the fields ask, say; map them with data.columns",
        ),
    ],
)
def test_what_cannot_be_mapped_says_so(fields: dict[str, Any], reason: str) -> None:
    """The exports of accounts as of 2025; oasst1's rows."""
    assert refusal(fields) == f"a.jsonl: {reason}"


def test_documents_with_a_role_of_another_kind_are_documents() -> None:
    assert parse_rows([Row("a.jsonl:1", {"role": "Engineer", "text": "a"})])[0].unread == ("role",)


@pytest.mark.parametrize(
    ("columns", "fields", "format", "expected"),
    [
        ({"completion": "{x}"}, {"prompt": "a", "x": "b"}, "prompt_completion", ["a", "b"]),
        ({"prompt": "{x}"}, {"x": "a", "completion": "b"}, "prompt_completion", ["a", "b"]),
        ({"prompt": "Q: {question}"}, {"question": "a", "answer": "b"}, "prompt_completion", ["Q: a", "b"]),
        ({"prompt": "{x}"}, {"x": "a", "chosen": "b", "rejected": "c"}, "preference", ["a", "b"]),
        ({"rejected": "{x}"}, {"prompt": "a", "chosen": "b", "x": "c"}, "preference", ["a", "b"]),
        ({"system": "Be {x}."}, {"question": "a", "answer": "b", "x": "c"}, "prompt_completion", ["Be c.", "a", "b"]),
        ({"system": "s"}, {"instruction": "a", "output": "b"}, "alpaca", ["s", "a", "b"]),
        ({"system": "s"}, {"conversations": SHAREGPT}, "sharegpt", ["s", "a", "b"]),
    ],
)  # fmt: skip
def test_columns_that_are_not_mapped_keep_their_names(
    columns: dict[str, str], fields: dict[str, Any], format: str, expected: list[str]
) -> None:
    """a3dff15 asked for all of a format's columns where one was mapped."""
    assert detect_format([Row("a.jsonl:1", fields)], columns)[0] == format
    assert [content for _, content in said(fields, columns=columns)] == expected
    assert [content for _, content in said(fields, columns=columns, format=format)] == expected


@pytest.mark.parametrize(
    ("columns", "fields", "reason"),
    [
        (
            {"completion": "{x}"},
            {"task": "a", "x": "b"},
            "a.jsonl:1: no field 'prompt'; the row has task, x; map it with data.columns.prompt",
        ),
        ({"completion": "{x}", "chosen": "{x}"}, {"x": "b"}, "data.columns: got chosen, completion, which are of"),
        ({"system": "s"}, {"text": "a"}, "data.columns: system cannot be used with format text"),
    ],
)
def test_what_is_missing_is_asked_for(columns: dict[str, str], fields: dict[str, Any], reason: str) -> None:
    assert refusal(fields, columns=columns).startswith(reason)
