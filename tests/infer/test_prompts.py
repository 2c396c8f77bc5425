"""Rows of every format that training reads, with and without an answer, as what a model is asked."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from gemma_ft.data.conversation import Turn
from gemma_ft.data.read.sources import Row
from gemma_ft.errors import DataError, UserError
from gemma_ft.infer.prompts import prompts_of, system_turns

Q, A = "How far?", "Far."
ASKED = (Turn("user", Q),)
LONG = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": Q}]


def rows(*fields: dict[str, Any]) -> list[Row]:
    return [Row(f"rows.jsonl:{number}", one) for number, one in enumerate(fields, start=1)]


@pytest.mark.parametrize(
    ("fields", "turns"),
    [
        ({"prompt": Q}, ASKED),
        ({"prompt": Q, "completion": A}, ASKED),
        ({"question": Q}, ASKED),
        ({"question": Q, "answer": A}, ASKED),
        ({"question": Q, "answer": A, "prompt": "not asked"}, ASKED),
        ({"prompt": Q, "system": "Be brief."}, (Turn("system", "Be brief."), *ASKED)),
        ({"instruction": "How", "input": "far?"}, (Turn("user", "How\n\nfar?"),)),
        ({"instruction": Q, "output": A}, ASKED),
        ({"messages": [{"role": "user", "content": Q}]}, ASKED),
        ({"messages": [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]}, ASKED),
        ({"messages": LONG}, (Turn("user", "a"), Turn("assistant", "b"), *ASKED)),
        ({"messages": json.dumps(LONG)}, (Turn("user", "a"), Turn("assistant", "b"), *ASKED)),
        ({"messages": [{"role": "human", "content": [{"type": "text", "text": Q}]}]}, ASKED),
        ({"system": "s", "messages": LONG[2:]}, (Turn("system", "s"), *ASKED)),
        ({"prompt": LONG[2:]}, ASKED),
        ({"prompt": Q, "completion": "a bad one", "label": False}, ASKED),
        ({"conversations": [{"from": "human", "value": Q}]}, ASKED),
        ({"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]}, ASKED),
    ],
)
def test_what_a_row_asks(fields: dict[str, Any], turns: tuple[Turn, ...]) -> None:
    before = repr(fields)
    (prompt,) = prompts_of(rows(fields))
    assert (prompt.turns, prompt.text, prompt.row.fields) == (turns, None, fields)
    assert repr(fields) == before


def test_columns_name_what_is_asked() -> None:
    (prompt,) = prompts_of(rows({"q": Q, "who": "you"}), columns={"prompt": "{q} ({who})"})
    assert prompt.turns == (Turn("user", f"{Q} (you)"),)
    (prompt,) = prompts_of(rows({"prompt": Q}), columns={"system": "s"})
    assert prompt.turns == (Turn("system", "s"), *ASKED)
    (prompt,) = prompts_of(rows({"talk": {"turns": LONG}}), columns={"messages": "{talk.turns}"})
    assert prompt.turns[-1] == Turn("user", Q)


def test_plain_text_is_continued() -> None:
    (prompt,) = prompts_of(rows({"text": " Once "}))
    assert (prompt.turns, prompt.text) == ((), " Once ")
    (prompt,) = prompts_of(rows({"prompt": " Once "}), raw=True)
    assert (prompt.turns, prompt.text) == ((), " Once ")


def test_a_system_text_goes_where_a_row_has_none() -> None:
    own, none = prompts_of(rows({"prompt": Q, "system": "own"}, {"prompt": Q, "system": ""}), system="given")
    assert [prompt.turns[0].content for prompt in (own, none)] == ["own", "given"]


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"prompt": None}, {}, "rows.jsonl:1: 'prompt' is null, expected text"),
        ({"prompt": " "}, {}, "rows.jsonl:1: the question is empty"),
        ({"text": "\n"}, {}, "rows.jsonl:1: the text is empty"),
        ({"messages": [{"role": "user", "content": 3}]}, {},
         "rows.jsonl:1: turn 1: 'content' is a number, expected text"),
        ({"messages": LONG}, {"raw": True}, "rows.jsonl:1: has 3 turns; --raw continues the one text of a row"),
        ({"instruction": "i", "instances": [{"input": "a", "output": "b"}] * 2}, {},
         "rows.jsonl:1: holds 2 questions; give each a row of its own"),
        ({"body": Q}, {}, "rows.jsonl: no known format has the fields body; map them with data.columns"),
        ({"q": Q}, {"columns": {"prompt": "{p}"}}, "rows.jsonl:1: no field 'p'; the row has q"),
    ],
)  # fmt: skip
def test_rows_that_ask_nothing(fields: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        prompts_of(rows(fields), **options)
    assert str(caught.value) == message


def test_the_first_five_bad_rows_are_named() -> None:
    with pytest.raises(DataError) as caught:
        prompts_of(rows({"prompt": "good"}, *[{"prompt": n} for n in range(7)]))
    lines = str(caught.value).splitlines()
    assert lines[0] == "rows.jsonl:2: 'prompt' is a number, expected text"
    assert (len(lines), lines[-1]) == (6, "... and 2 more bad rows")


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("error", "this model was trained to refuse system texts; put the text into the question"),
        ("drop", "this model was trained to leave out system texts; put the text into the question"),
    ],
)
def test_a_system_text_is_refused_where_it_was_not_trained(policy: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        system_turns(SimpleNamespace(system_policy=policy), "Be brief.")  # type: ignore[arg-type]
    assert str(caught.value) == message
    assert system_turns(SimpleNamespace(system_policy=policy), None) == []  # type: ignore[arg-type]
