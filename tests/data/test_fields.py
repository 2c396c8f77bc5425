"""Fields of a row that no parser reads: found for every format, told with counts, refused where they matter."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy
import pytest
from rich.console import Console

from gemma_ft.data.check.preview import build_preview
from gemma_ft.data.check.rows import RowSource
from gemma_ft.data.check.survey import survey
from gemma_ft.data.conversation import Item
from gemma_ft.data.encode.cache import Cache
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.documents import Documents
from gemma_ft.data.encode.encode_rows import Reading
from gemma_ft.data.pack.arrange import DataStats, arrange, prepare
from gemma_ft.data.pack.stream import Arranging, Cursor, Stream, StreamSource
from gemma_ft.data.read.bad_rows import BadRows
from gemma_ft.data.read.fields import harmless
from gemma_ft.data.read.parse_rows import parse_rows
from gemma_ft.data.read.sources import Row, read_chunks
from gemma_ft.errors import DataError
from gemma_ft.ui.data_check import show_report
from gemma_ft.ui.data_preview import show

File = Callable[[str, str | bytes], str]
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PAIR = {"prompt": "a", "completion": "b"}
CALL = [{"type": "function", "function": {"name": "weather", "arguments": "{}"}}]
CALLING = [CHAT[0], {"role": "assistant", "content": "Let me look.", "tool_calls": CALL}]
NO_TOOLS = "nothing renders tool calls or their results; take such rows out, or write them as text of the turns"
NO_MEDIA = (
    "is not empty: only text can be trained, and the answer may be about what is not in it; take the row out, or the "
    "field where the text says all"
)
BAD_ANSWER = "is false: the answer is a bad one, and would be trained as a good one; take such rows out"


def parsed(fields: dict[str, Any], **arguments: Any) -> Item:
    (item,) = parse_rows([Row("a.jsonl:1", fields)], **arguments)
    return item


def refusal(fields: dict[str, Any], **arguments: Any) -> str:
    with pytest.raises(DataError) as caught:
        parsed(fields, **arguments)
    return str(caught.value).removeprefix("a.jsonl:1: ")


@pytest.mark.parametrize(
    ("fields", "unread"),
    [
        ({"messages": CHAT, "tools": CALL}, ("tools",)),
        ({"messages": [CHAT[0], {**CHAT[1], "reasoning_content": "hm"}]}, ("messages[].reasoning_content",)),
        ({"messages": [{**CHAT[0], "loss": False}, CHAT[1]], "files": ["a.png"]}, ("files", "messages[].loss")),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "thinking": "c"}]},
            ("conversations[].thinking",),
        ),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, ("history",)),
        ({"instruction": "a", "instances": [{"input": "", "output": "b", "hint": "c"}]}, ("instances[].hint",)),
        ({"instruction": "a", "output": "b", "instances": [1]}, ("instances",)),
        ({"question": "a", "context": "c", "answer": "b"}, ("context",)),
        ({**PAIR, "label": 0}, ("label",)),
        ({"text": "a", "label": "positive", "system": "s"}, ("label", "system")),
        ({"text": "a", "label": False}, ("label",)),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "reason": "d"}, ("reason",)),
        ({**PAIR, "\x1b[31mred": "c", "x" * 99: "d"}, (r"'\x1b[31mred'", "x" * 60 + "...")),
        ({"prompt": "x", "chosen": CHAT, "rejected": [CHAT[0], {**CHAT[1], "content": "c"}]}, ("prompt",)),
    ],
)
def test_what_is_not_read_is_found_in_every_format(fields: dict[str, Any], unread: tuple[str, ...]) -> None:
    """a3dff15 said nothing of any of these."""
    assert parsed(fields).unread == unread


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": CHAT, "id": 4, "source": "x", "metadata": {"a": 1}, "conversation_id": "c", "num_turns": 2},
        {"messages": [{**CHAT[0], "name": "Ann", "id": 1, "timestamp": 3}, {**CHAT[1], "train": True, "weight": 1}]},
        {"messages": [{**CHAT[0], "images": []}, CHAT[1]], "audio": "", "image": None},
        {"messages": CHAT, "tools": None, "images": [], "system": "", "rejected": None, "extra": {}},  # absent cells
        {"messages": [CHAT[0], {**CHAT[1], "tool_calls": None, "function_call": {}}]},
        {**PAIR, "label": True, "": 0, "Unnamed: 0": 0, "__index_level_0__": 0, "_id": "x"},
        {"instruction": "a", "output": "b", "input": "", "system": "s"},
        {"prompt": "a", "chosen": CHAT, "rejected": [CHAT[0], {**CHAT[1], "content": "c"}], "score_chosen": 5.0},
    ],
)
def test_harmless_fields_need_no_word(fields: dict[str, Any]) -> None:
    assert parsed(fields).unread == ()


def test_what_a_template_reads_is_read() -> None:
    columns = {"prompt": "{title}: {body.text}", "completion": "{label}", "weight": "{share}"}
    fields = {"title": "a", "body": {"text": "b"}, "label": "False", "share": 2, "hint": "c"}
    assert parsed(fields, columns=columns).unread == ("hint",)


@pytest.mark.parametrize(
    "name", ["id", "ID", "source", "doc_id", "created_at", "num_tokens", "score", "Unnamed: 3", ""]
)
def test_names_that_are_harmless(name: str) -> None:
    assert harmless(name)


@pytest.mark.parametrize("name", ["system", "tools", "context", "label", "hidden", "weight", "identity", "title"])
def test_names_that_are_not(name: str) -> None:
    assert not harmless(name)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({**PAIR, "label": False}, f"'label' {BAD_ANSWER}"),
        ({"messages": CHAT, "label": "False"}, f"'label' {BAD_ANSWER}"),
        ({"instruction": "a", "output": "b", "kto_tag": False}, f"'kto_tag' {BAD_ANSWER}"),
        (
            {**PAIR, "rejected": "c"},
            "has 'rejected', and no 'chosen'; name that with data.columns.chosen, or take 'rejected' out",
        ),
        ({"messages": CALLING, "tools": CALL}, f"turn 2: 'tool_calls': {NO_TOOLS}"),
        ({"messages": [CHAT[0], {**CALLING[1], "content": None}]}, f"turn 2: 'tool_calls': {NO_TOOLS}"),
        ({"messages": [CHAT[0], {**CHAT[1], "function_call": {"name": "f"}}]}, f"turn 2: 'function_call': {NO_TOOLS}"),
        ({**PAIR, "tool_calls": CALL}, f"'tool_calls': {NO_TOOLS}"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "observation", "value": "b"}]},
            f"turn 2: role 'observation': {NO_TOOLS}",
        ),
        ({"messages": CHAT, "images": ["a.png"]}, f"'images' {NO_MEDIA}"),
        ({"messages": CHAT, "image": {"bytes": b"x", "path": None}}, f"'image' {NO_MEDIA}"),
        (
            {
                "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "b"}],
                "image": "coco/1.jpg",
            },
            f"'image' {NO_MEDIA}",
        ),
        ({"instruction": "a", "output": "b", "audio": {"path": "a.wav"}}, f"'audio' {NO_MEDIA}"),
        ({**PAIR, "videos": [{"path": "a.mp4"}]}, f"'videos' {NO_MEDIA}"),
        ({"messages": [{**CHAT[0], "images": ["a.png"]}, CHAT[1]]}, f"turn 1: 'images' {NO_MEDIA}"),
    ],
)
def test_what_changes_the_meaning_of_an_answer_is_refused(fields: dict[str, Any], reason: str) -> None:
    """a3dff15 trained "Go away." of TRL's unpaired preferences (TRL 1.16.0, KTO's rows) as a good answer."""
    assert refusal(fields) == reason


def test_empty_fields_of_pictures_say_nothing_and_a_text_stands_without_its_picture() -> None:
    """datasets 5.0 writes an absent Image as an object of nulls."""
    absent = {"image": {"bytes": None, "path": None}, "images": [None], "audio": [{"path": ""}]}
    assert parsed({"messages": CHAT, **absent}).unread == ("image", "images", "audio")
    assert parsed({"text": "a", "image": "a.png"}).unread == ("image",)
    assert refusal({"prompt": "a", "image": "a.png"} | {"completion": ""}, trained=False) == f"'image' {NO_MEDIA}"


def test_a_good_answer_may_be_named_beside_a_rejected_one() -> None:
    fields = {**PAIR, "rejected": "c"}
    assert [turn.content for turn in parsed(fields, columns={"chosen": "{completion}"}).turns] == ["a", "b"]


def test_a_bad_answer_does_not_matter_where_none_is_trained() -> None:
    assert parsed({**PAIR, "label": False}, trained=False).turns[0].content == "a"


def test_a_system_beside_messages_is_the_system_turn() -> None:
    """Anthropic's form; a3dff15 left it out."""
    turns = parsed({"system": "Answer in French.", "messages": CHAT}).turns
    assert [(turn.role, turn.content) for turn in turns] == [
        ("system", "Answer in French."), ("user", "a"), ("assistant", "b")
    ]  # fmt: skip
    parts = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    assert parsed({"system": parts, "messages": CHAT}).turns[0].content == "Be brief."
    chats = {"chosen": CHAT, "rejected": [CHAT[0], {**CHAT[1], "content": "c"}], "system": "s"}
    assert [turn.role for turn in parsed(chats).turns] == ["system", "user", "assistant"]
    own = [{"role": "system", "content": "s"}, *CHAT]
    assert len(parsed({"system": "s", "messages": own}).turns) == 3
    assert refusal({"system": "t", "messages": own}) == (
        "has a system turn, and another text beside the turns in 'system'; keep one of them"
    )


# Counts


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


ROWS = [{"messages": CHAT, "tools": CALL, "id": n, **({"context": "c"} if n % 3 == 0 else {})} for n in range(9)]


def test_counts_come_with_the_encoded_rows_and_out_of_the_cache(
    file: File, encoder: ChatEncoder, tmp_path: Any
) -> None:
    source, reading = file("a.jsonl", lines(*ROWS)), Reading("messages", {}, encoder)
    cache = Cache(tmp_path / "cache", 1)
    for _ in range(2):
        documents = cache.documents(read_chunks(source), reading, BadRows())
        assert documents.remarks(numpy.arange(9)) == {("unread", "tools"): 9, ("unread", "context"): 3}
        assert documents.remarks(numpy.array([0, 0, 1])) == {("unread", "tools"): 3, ("unread", "context"): 2}
        stats = arrange(documents, encoder, max_seq_len=64, packing=False, chosen=numpy.arange(4)).stats
        assert stats.describe().splitlines()[-1] == "not read: tools in 4 rows, context in 2"


def test_counts_of_what_is_streamed(file: File, encoder: ChatEncoder) -> None:
    source = file("a.jsonl", lines(*ROWS))
    one = StreamSource("a", partial(read_chunks, source), Reading("messages", {}, encoder), 5, 1.0, 1.0, False)
    stream = Stream([one], Arranging(64, True, "auto"), 1, frozenset(), skip_bad_rows=False)
    assert next(stream.blocks(Cursor())).prepared.stats.unread == {"tools": 5, "context": 2}


def test_counts_are_added_and_written(encoder: ChatEncoder) -> None:
    items = parse_rows([Row(f"a.jsonl:{n}", row) for n, row in enumerate(ROWS)])
    stats = prepare(items[:4], encoder, max_seq_len=64, packing=True).stats
    stats.add(prepare(items[4:], encoder, max_seq_len=64, packing=True).stats)
    assert stats.as_dict()["unread"] == {"tools": 9, "context": 3}
    assert DataStats(**json.loads(json.dumps(stats.as_dict()))).describe().splitlines()[-1] == (
        "not read: tools in 9 rows, context in 3"
    )


def test_many_different_fields_are_told_in_few_words(encoder: ChatEncoder) -> None:
    rows = [Row(f"a.jsonl:{n}", {"messages": CHAT, f"key{n}": "x"}) for n in range(1200)]
    documents = Documents.of(parse_rows(rows), encoder)
    told = documents.remarks(numpy.arange(1200))
    assert len(told) == 1000
    assert told["unread", "other fields"] == 201
    line = arrange(documents, encoder, max_seq_len=64, packing=False).stats.warnings()[0]
    assert line.startswith("not read: other fields in 201 rows, key0 in 1, ")
    assert line.endswith(", and 992 more fields")


def test_preview_tells_and_passes(encoder: ChatEncoder) -> None:
    items = parse_rows([Row("a.jsonl:1", ROWS[0])])
    preview = build_preview(prepare(items, encoder, max_seq_len=64, packing=True), encoder)
    assert (preview.faults, preview.warnings()) == ([], ["not read: context in 1 row, tools in 1"])
    output = io.StringIO()
    show(preview, Console(file=output, width=120))
    assert output.getvalue().splitlines()[-1].rstrip() == "! not read: context in 1 row, tools in 1"


def test_data_check_tells(file: File, encoder: ChatEncoder) -> None:
    rows = [{"messages": CHAT, "id": 1}, *({**row, "messages": [{**CHAT[0], "content": str(n)}, CHAT[1]]}
                                           for n, row in enumerate(ROWS))]  # fmt: skip
    source = file("a.jsonl", lines(*rows))
    report = survey(
        [RowSource("train", source, partial(read_chunks, source), Reading("messages", {}, encoder), "named")],
        max_seq_len=64,
    )
    finding = report.findings["unread"]
    assert (finding.severity, finding.count) == ("warning", 9)
    assert str(finding.places[0]) == "a.jsonl:2: tools, context"
    assert json.loads(json.dumps(report.as_dict()))["sources"][0]["unread"] == {"tools": 9, "context": 3}
    output = io.StringIO()
    show_report(report, Console(file=output, width=120))
    assert output.getvalue().splitlines()[1] == "       not read: tools in 9 rows, context in 3"
