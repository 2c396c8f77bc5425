"""Each format's rows as conversations and documents; detection that tells its reason; bad rows with their places."""

from typing import Any

import pytest

from gemma_ft.data.conversation import Conversation, PlainText, Turn
from gemma_ft.data.read.detect import detect_format
from gemma_ft.data.read.parse_rows import parse_rows
from gemma_ft.data.read.sources import Row
from gemma_ft.errors import DataError

SYNTAX = "write fields as {name}, {name.inner} or {name[0].inner}, and braces as {{ }}"
HALF_PAIR = "holds half a surrogate pair at character 2; the text was cut inside a character"
NUL = "holds a NUL character; is the file damaged, or not UTF-8?"
KNOWN = "known roles: system, developer, user, human, assistant, model, gpt, chatgpt, bing, bard, claude"
NO_TOOLS = "nothing renders tool calls or their results; take such rows out, or write them as text of the turns"


def rows(*fields: dict[str, Any]) -> list[Row]:
    return [Row(f"a.jsonl:{number}", one) for number, one in enumerate(fields, start=1)]


def chat(*contents: str, left_out: int = 0, line: int = 1, system: str | None = None) -> Conversation:
    turns = [Turn("system", system)] if system is not None else []
    turns += [Turn("user" if at % 2 == 0 else "assistant", content) for at, content in enumerate(contents)]
    return Conversation(f"a.jsonl:{line}", tuple(turns), left_out)


def messages(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def sharegpt(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": content} for role, content in pairs]}


MESSAGES = messages(("system", "s"), ("user", "a"), ("assistant", "b"))
SHAREGPT = sharegpt(("human", "a"), ("gpt", "b"), ("user", "c"), ("chatgpt", "d"))
ALPACA = {"instruction": "a", "input": "b", "output": "c"}
SEED = {"instruction": "a", "instances": [{"input": "", "output": "c"}, {"input": "b", "output": "d"}], "name": "x"}
PAIR = {"prompt": "a", "completion": "b"}
QUESTION = {"question": "a", "answer": "b"}
TEXT = {"text": "a"}
PREFERENCE = {"prompt": "a", "chosen": "b", "rejected": "c"}
ONE_OF_EACH = {
    "messages": MESSAGES,
    "sharegpt": SHAREGPT,
    "alpaca": ALPACA,
    "prompt_completion": PAIR,
    "text": TEXT,
    "preference": PREFERENCE,
}


@pytest.mark.parametrize(
    ("fields", "name", "reason", "expected"),
    [
        (MESSAGES, "messages", "the rows have messages", [chat("a", "b", system="s")]),
        (SHAREGPT, "sharegpt", "the rows have conversations", [chat("a", "b", "c", "d")]),
        (ALPACA, "alpaca", "the rows have instruction, output", [chat("a\n\nb", "c")]),
        (SEED, "alpaca", "the rows have instruction, instances", [chat("a", "c"), chat("a\n\nb", "d")]),
        (PAIR, "prompt_completion", "the rows have prompt, completion", [chat("a", "b")]),
        (QUESTION, "prompt_completion", "the rows have question, answer", [chat("a", "b")]),
        (TEXT, "text", "the rows have text", [PlainText("a.jsonl:1", "a")]),
        (
            {"conversations": MESSAGES["messages"]},
            "messages",
            "the rows have conversations",
            [chat("a", "b", system="s")],
        ),
        ({"instruction": "a", "output": "c"}, "alpaca", "the rows have instruction, output", [chat("a", "c")]),
        ({**ALPACA, "input": None}, "alpaca", "the rows have instruction, output", [chat("a", "c")]),
        (
            {**PAIR, "system": "s"},
            "prompt_completion",
            "the rows have prompt, completion",
            [chat("a", "b", system="s")],
        ),
        ({**ALPACA, "system": ""}, "alpaca", "the rows have instruction, output", [chat("a\n\nb", "c")]),
    ],
)
def test_formats_are_detected_and_parsed(fields: dict[str, Any], name: str, reason: str, expected: list[Any]) -> None:
    assert detect_format(rows(fields)) == (name, reason)
    assert parse_rows(rows(fields)) == expected
    assert parse_rows(rows(fields), format=name) == expected


def message(*fields: dict[str, Any], **arguments: Any) -> str:
    with pytest.raises(DataError) as caught:
        parse_rows(rows(*fields), **arguments)
    return str(caught.value)


def test_two_readings_are_refused() -> None:
    assert message({**ALPACA, "text": "x"}) == (
        "a.jsonl: alpaca (instruction, output) and text (text) fit; set data.format, or data.columns"
    )
    assert message({**PAIR, **QUESTION}) == (
        "a.jsonl: prompt_completion (prompt, completion) and prompt_completion (question, answer) fit; "
        "set data.format, or data.columns"
    )
    assert message({"text": "x", "chosen": "b", "rejected": "c"}) == (
        "a.jsonl: preference (chosen, rejected) and text (text) fit; set data.format, or data.columns"
    )
    both = {"conversations": MESSAGES["messages"], "messages": SHAREGPT["conversations"]}
    assert message(both) == (
        "a.jsonl: sharegpt (messages) and messages (conversations) fit; set data.format, or data.columns"
    )
    unread = ("instruction", "input", "output")
    assert parse_rows(rows({**ALPACA, "text": "x"}), format="text") == [PlainText("a.jsonl:1", "x", unread=unread)]


def test_a_prompt_that_columns_name_is_that_of_preferences_where_half_of_the_rows_are_some() -> None:
    pair, preference = {"q": "a", "completion": "b"}, {"q": "a", "chosen": "b", "rejected": "c"}
    reason = "data.columns names prompt"
    assert detect_format(rows(pair, preference), {"prompt": "{q}"}) == ("preference", reason)
    assert detect_format(rows(pair, pair, preference), {"prompt": "{q}"}) == ("prompt_completion", reason)


def test_no_reading_is_refused() -> None:
    assert message({"problem": "a", "solution": "b"}) == (
        "a.jsonl: no known format has the fields problem, solution; map them with data.columns"
    )


def test_detection_follows_most_rows_and_names_the_others() -> None:
    assert message(QUESTION, QUESTION, {"question": "a"}, {"answer": "b"}) == (
        "a.jsonl:3: no field 'answer'; the row has question\na.jsonl:4: no field 'question'; the row has answer"
    )


def test_unknown_format() -> None:
    assert message(PAIR, format="chatml") == (
        "data.format: unknown format 'chatml'; "
        "use auto, messages, sharegpt, alpaca, prompt_completion, text, preference"
    )


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (messages(("user", "a"), ("assistant", None)), "turn 2: 'content' is null, expected text"),
        (messages(("user", ["a"]), ("assistant", "b")), "turn 1: 'content' is a list, expected text"),
        (messages(("user", 7), ("assistant", "b")), "turn 1: 'content' is a number, expected text"),
        (messages(("user", True), ("assistant", "b")), "turn 1: 'content' is true or false, expected text"),
        (messages(("user", {}), ("assistant", "b")), "turn 1: 'content' is an object, expected text"),
        (messages(("user", "a"), ("tool", "b")), f"turn 2: role 'tool': {NO_TOOLS}"),
        (messages(("user", "a"), (None, "b")), f"turn 2: unknown role None; {KNOWN}"),
        (messages(("user", "a")), "has no assistant turn, nothing to train on"),
        (messages(("assistant", "a")), "turn 1: a conversation starts with a user turn, got assistant"),
        (
            messages(("user", "a"), ("user", "b"), ("assistant", "c")),
            "turn 2: user and assistant must alternate, got user after user",
        ),
        (messages(("user", "a"), ("system", "b"), ("assistant", "c")), "turn 2: a system turn can only come first"),
        (
            messages(("user", "a"), ("assistant", "b"), ("user", "c")),
            "turn 3: the last turn must be the assistant's, got user",
        ),
        (messages(("user", "a\x00"), ("assistant", "b")), f"turn 1: 'content' {NUL}"),
        (messages(("user", "a\ud83d"), ("assistant", "b")), f"turn 1: 'content' {HALF_PAIR}"),
        ({"messages": []}, "has no assistant turn, nothing to train on"),
        ({"messages": "[]"}, "has no assistant turn, nothing to train on"),
        ({"messages": "[1"}, "expected a list of turns in 'messages', got text that is no list in JSON"),
        ({"messages": [7]}, "turn 1: expected an object, got a number"),
        ({"messages": [{"role": "user"}]}, "turn 1: no field 'content'; the turn has role"),
        ({"messages": [{"role": "user", "content": "a"}] * 2001}, "has 2001 turns, more than 2000"),
        ({"other": 1}, "no field 'messages'; the row has other"),
        ({}, "no field 'messages'; the row has none"),
        ({"messages": None}, "expected a list of turns in 'messages', got null"),
    ],
)
def test_bad_messages(fields: dict[str, Any], reason: str) -> None:
    assert message(fields, format="messages") == f"a.jsonl:1: {reason}"


@pytest.mark.parametrize(
    ("fields", "name", "reason"),
    [
        ({"prompt": None, "completion": "b"}, "prompt_completion", "'prompt' is null, expected text"),
        ({"prompt": "a", "completion": ["b"]}, "prompt_completion", "'completion' is a list, expected text"),
        ({"prompt": "a"}, "prompt_completion", "no field 'completion'; the row has prompt"),
        ({"answer": "a"}, "prompt_completion", "no field 'question'; the row has answer"),
        ({**PAIR, "system": 3}, "prompt_completion", "'system' is a number, expected text"),
        ({"instruction": "a"}, "alpaca", "no field 'output'; the row has instruction"),
        ({"instruction": "a", "output": None}, "alpaca", "'output' is null, expected text"),
        ({"instruction": "a", "instances": []}, "alpaca", "'instances' is empty, expected a list of input and output"),
        ({"instruction": "a", "instances": "b"}, "alpaca", "'instances' is text, expected a list of input and output"),
        ({"instruction": "a", "instances": [1]}, "alpaca", "'instances[0]' is a number, expected an object"),
        ({"text": 7}, "text", "'text' is a number, expected text"),
        ({}, "text", "no field 'text'; the row has none"),
        (
            sharegpt(("human", "a"), ("alien", "b")),
            "sharegpt",
            f"turn 2: unknown role 'alien'; {KNOWN}",
        ),
        ({"prompt": "a", "completion": "b"}, "sharegpt", "no field 'conversations'; the row has prompt, completion"),
        (sharegpt(("gpt", "a"), ("human", "b")), "sharegpt", "has no assistant turn, nothing to train on"),
        (
            sharegpt(("human", "a"), ("human", "b"), ("gpt", "c")),
            "sharegpt",
            "turn 2: user and assistant must alternate, got user after user",
        ),
    ],
)
def test_bad_rows_of_other_formats(fields: dict[str, Any], name: str, reason: str) -> None:
    assert message(fields, format=name) == f"a.jsonl:1: {reason}"


def test_the_first_five_bad_rows_and_a_count() -> None:
    bad = [{"question": "a", "answer": None}] * 7
    assert message(QUESTION, *bad) == (
        "".join(f"a.jsonl:{line}: 'answer' is null, expected text\n" for line in range(2, 7))
        + "... and 2 more bad rows"
    )
    assert message(QUESTION, *bad[:6]).endswith("\n... and 1 more bad row")
    assert "more" not in message(QUESTION, *bad[:5])


def test_sharegpt_leaves_out_and_counts_what_cannot_be_trained() -> None:
    leading = sharegpt(("gpt", "x"), ("human", "a"), ("gpt", "b"))
    trailing = sharegpt(("human", "a"), ("gpt", "b"), ("human", "y"))
    both = sharegpt(("system", "s"), ("gpt", "x"), ("human", "a"), ("gpt", "b"), ("human", "y"))
    assert parse_rows(rows(leading)) == [chat("a", "b", left_out=1)]
    assert parse_rows(rows(trailing)) == [chat("a", "b", left_out=1)]
    assert parse_rows(rows(both)) == [chat("a", "b", left_out=2, system="s")]


def test_sharegpt_system_beside_the_turns() -> None:
    assert parse_rows(rows({**SHAREGPT, "system": "s"})) == [chat("a", "b", "c", "d", system="s")]


@pytest.mark.parametrize(
    ("columns", "fields", "expected", "name"),
    [
        ({"prompt": "{q}", "completion": "{a}"}, {"q": "x", "a": "y"}, [chat("x", "y")], "prompt_completion"),
        (
            {"prompt": "Q: {q.text}?", "completion": "{a[1].b}!"},
            {"q": {"text": "x"}, "a": [{}, {"b": "y"}]},
            [chat("Q: x?", "y!")],
            "prompt_completion",
        ),
        (
            {"prompt": "{q}", "completion": "{a}", "system": "Answer {{briefly}}"},
            {"q": "x", "a": "y"},
            [chat("x", "y", system="Answer {briefly}")],
            "prompt_completion",
        ),
        ({"text": "{title}\n\n{body}"}, {"title": "x", "body": "y"}, [PlainText("a.jsonl:1", "x\n\ny")], "text"),
        ({"messages": "{dialog}"}, {"dialog": MESSAGES["messages"]}, [chat("a", "b", system="s")], "messages"),
        ({"messages": "{dialog}"}, {"dialog": SHAREGPT["conversations"]}, [chat("a", "b", "c", "d")], "sharegpt"),
        (
            {"messages": "{dialog}", "system": "{s}"},
            {"dialog": MESSAGES["messages"][1:], "s": "t"},
            [chat("a", "b", system="t")],
            "messages",
        ),
        ({"text": "{a.b}"}, {"a.b": "x"}, [PlainText("a.jsonl:1", "x")], "text"),
    ],
)
def test_columns(columns: dict[str, str], fields: dict[str, Any], expected: list[Any], name: str) -> None:
    assert detect_format(rows(fields), columns)[0] == name
    assert parse_rows(rows(fields), columns=columns) == expected


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (
            {"promt": "{q}"},
            "data.columns: unknown key 'promt'; use prompt, completion, system, messages, text, chosen, rejected, "
            "weight, label, margin",
        ),
        (
            {"prompt": "{q}", "text": "{q}"},
            "data.columns: got prompt, text, which are of different formats; give prompt and completion, or messages, "
            "or text, or prompt, chosen and rejected (weight goes with all, system, label and margin with all "
            "but text)",
        ),
        (
            {"prompt": "{q}"},
            "a.jsonl:1: no field 'completion'; the row has q, n, l; map it with data.columns.completion",
        ),
        ({"text": "{q}", "system": "s"}, "data.columns: system does not go with text; a plain document has no turns"),
        ({"text": "{q"}, "data.columns.text: cannot read '{' in '{q'; " + SYNTAX),
        ({"text": "{}"}, "data.columns.text: cannot read '{}' in '{}'; " + SYNTAX),
        ({"text": "{q[x]}"}, "data.columns.text: cannot read '{q[x]}' in '{q[x]}'; " + SYNTAX),
        ({"text": "{w}"}, "a.jsonl:1: no field 'w'; the row has q, n, l"),
        ({"text": "{n}"}, "a.jsonl:1: 'n' is null, expected text"),
        ({"text": "{q.x}"}, "a.jsonl:1: 'q' is text, it has no field 'x'"),
        ({"text": "{q[0]}"}, "a.jsonl:1: 'q' is text, it has no element [0]"),
        ({"text": "{l[3]}"}, "a.jsonl:1: 'l' has 1 elements, no [3]"),
        ({"text": "{l[0].k}"}, "a.jsonl:1: no field 'l[0].k'; the row has j"),
        ({"text": "{q.__class__}"}, "a.jsonl:1: 'q' is text, it has no field '__class__'"),
        ({"messages": "{q} {n}"}, "a.jsonl:1: data.columns.messages must be one field such as {dialog}, got '{q} {n}'"),
    ],
)
def test_bad_columns(columns: dict[str, str], expected: str) -> None:
    assert message({"q": "x", "n": None, "l": [{"j": 1}]}, columns=columns) == expected


@pytest.mark.parametrize(("found", "expected"), [(2, 2.0), (0.25, 0.25), ("0.5", 0.5), (0, 0.0)])
@pytest.mark.parametrize("form", list(ONE_OF_EACH))
def test_a_weight_goes_with_every_format(form: str, found: Any, expected: float) -> None:
    (item,) = parse_rows(rows({**ONE_OF_EACH[form], "w": found}), columns={"weight": "{w}"}, format=form)
    assert item.weight == expected
    (item,) = parse_rows(rows({**ONE_OF_EACH[form], "w": found}), columns={"weight": "{w}"})
    assert item.weight == expected


def test_a_field_named_weight_is_none_unless_columns_say_so() -> None:
    (item,) = parse_rows(rows({**PAIR, "weight": 7}))
    assert item.weight == 1


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (True, "the weight {w} is true or false, expected a number"),
        (None, "the weight {w} is null, expected a number"),
        ("heavy", "the weight {w} is text, expected a number"),
        ([1], "the weight {w} is a list, expected a number"),
        (-1, "the weight {w} is -1, expected 0, or 1e-06 to 1e+06"),
        ("nan", "the weight {w} is nan, expected 0, or 1e-06 to 1e+06"),
        (10**400, "the weight {w} is inf, expected 0, or 1e-06 to 1e+06"),
        (1e-50, "the weight {w} is 1e-50, expected 0, or 1e-06 to 1e+06"),
        (1e7, "the weight {w} is 1e+07, expected 0, or 1e-06 to 1e+06"),
    ],
)
def test_what_is_no_weight_is_refused(found: Any, expected: str) -> None:
    assert message({**PAIR, "w": found}, columns={"weight": "{w}"}) == f"a.jsonl:1: {expected}"


def test_a_weight_is_one_field() -> None:
    assert message(PAIR, columns={"weight": "{a} {b}"}) == (
        "a.jsonl:1: data.columns.weight must be one field such as {score}, got '{a} {b}'"
    )


def test_columns_of_another_format() -> None:
    assert message(PAIR, columns={"text": "{prompt}"}, format="alpaca") == (
        "data.columns: text cannot be used with format alpaca"
    )
