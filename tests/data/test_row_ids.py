"""Rows are found by the names that messages give them; one that is not there is a line that says what is."""

import pytest

from gemma_ft.data.check.row_ids import documents_at
from gemma_ft.data.conversation import Conversation, Item, PlainText, Turn
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.documents import Documents, Part, table_of
from gemma_ft.data.pack.arrange import Prepared, arrange, prepare
from gemma_ft.errors import DataError


def chat(where: str, question: str = "Hi", answer: str = "Yes") -> Item:
    return Conversation(where, (Turn("user", question), Turn("assistant", answer)))


def prepared(encoder: ChatEncoder, *items: Item) -> Prepared:
    return prepare(list(items), encoder, max_seq_len=64, packing=True)


@pytest.fixture(scope="module")
def one(encoder: ChatEncoder) -> Prepared:
    """Line 3 is blank, 4 is empty, 5 too long, and line 6 gives two conversations."""
    empty, long = chat("x/a.jsonl:4", answer=" "), chat("x/a.jsonl:5", question="word " * 90)
    twice = chat("x/a.jsonl:6"), chat("x/a.jsonl:6", answer="No")
    return prepared(encoder, chat("x/a.jsonl:1"), chat("x/a.jsonl:2"), empty, long, *twice)


@pytest.fixture(scope="module")
def several(encoder: ChatEncoder) -> Prepared:
    return prepared(
        encoder, chat("x/a.jsonl:1"), chat("y/a.jsonl:1"), chat("b.parquet:row 1"), PlainText("b.parquet:row 2", "two")
    )


def places(found: Prepared, *row_ids: str) -> dict[str, list[int]]:
    return documents_at(found.examples, row_ids, max_seq_len=64)


def refusal(found: Prepared, *row_ids: str, held_out: set[str] = frozenset()) -> str:  # type: ignore[assignment]
    with pytest.raises(DataError) as caught:
        documents_at(found.examples, row_ids, max_seq_len=64, held_out=held_out)
    return str(caught.value)


@pytest.mark.parametrize("row_id", ["x/a.jsonl:2", "a.jsonl:2", "./x/a.jsonl:2", "2"])
def test_a_row_of_one_source_has_short_names(one: Prepared, row_id: str) -> None:
    assert places(one, row_id) == {"x/a.jsonl:2": [1]}


def test_rows_come_in_the_order_asked_for_with_all_that_they_gave(one: Prepared) -> None:
    assert list(places(one, "6", "1", "x/a.jsonl:6").items()) == [("x/a.jsonl:6", [3, 4]), ("x/a.jsonl:1", [0])]


def test_among_several_sources_a_path_tells_which(several: Prepared) -> None:
    assert places(several, "y/a.jsonl:1", "b.parquet:row 1", "b.parquet:2") == {
        "y/a.jsonl:1": [1],
        "b.parquet:row 1": [2],
        "b.parquet:row 2": [3],
    }
    assert refusal(several, "a.jsonl:1") == "a.jsonl:1: fits rows of x/a.jsonl and y/a.jsonl; write more of the path"
    assert refusal(several, "1") == "1: fits rows of x/a.jsonl and y/a.jsonl and b.parquet; write more of the path"
    assert refusal(several, "c.jsonl:1") == (
        "c.jsonl:1: no such source; rows are read from x/a.jsonl, y/a.jsonl, b.parquet"
    )
    assert places(several, "row 2") == {"b.parquet:row 2": [3]}


GONE = "gives nothing to train on: the line is blank, or its row was dropped (an empty question, answer or text)"


@pytest.mark.parametrize(
    ("row_id", "line"),
    [
        ("3", f"3: {GONE}; nearest: x/a.jsonl:2 and x/a.jsonl:6"),
        ("a.jsonl:4", f"a.jsonl:4: {GONE}; nearest: x/a.jsonl:2 and x/a.jsonl:6"),
        ("5", "x/a.jsonl:5: was dropped: its 285 tokens do not fit into data.max_seq_len 64; raise that"),
        ("7", "7: is not among the rows that are read from x/a.jsonl; nearest: x/a.jsonl:6"),
        ("0", "0: is not among the rows that are read from x/a.jsonl; nearest: x/a.jsonl:1"),
        ("last", "last: a row is named by its number, such as x/a.jsonl:1"),
        ("b.jsonl:1", "b.jsonl:1: no such source; rows are read from x/a.jsonl"),
        ("jsonl:1", "jsonl:1: no such source; rows are read from x/a.jsonl"),
        ("a.jsonl", "a.jsonl: a row is named by its number, such as x/a.jsonl:1"),
    ],
)
def test_a_row_that_is_not_trained_on_is_one_line(one: Prepared, row_id: str, line: str) -> None:
    assert refusal(one, row_id) == line


def test_all_that_are_missing_are_told_at_once(one: Prepared) -> None:
    assert refusal(one, "1", "7", "5").splitlines() == [refusal(one, "7"), refusal(one, "5")]


def test_held_out_rows_are_told(one: Prepared) -> None:
    kept = {"x/a.jsonl:5", "data/held.jsonl:9"}
    assert refusal(one, "5", held_out=kept) == "x/a.jsonl:5: is held out, not trained on; name another row"
    assert refusal(one, "held.jsonl:9", held_out=kept) == "held.jsonl:9: is held out, not trained on; name another row"


def test_a_row_that_no_epoch_sees_is_told(encoder: ChatEncoder) -> None:
    documents = Documents.of([chat("a.jsonl:1"), chat("a.jsonl:2")], encoder)
    first = arrange(documents, encoder, max_seq_len=64, packing=True, chosen=[0])
    assert places(first, "1") == {"a.jsonl:1": [0]}
    assert refusal(first, "2") == (
        "a.jsonl:2: is not among the training rows: repeats, weight or max_rows of its source leave it out"
    )


def test_a_bad_row_that_was_skipped_is_told_with_its_fault(encoder: ChatEncoder) -> None:
    table = table_of([chat("a.jsonl:1"), chat("a.jsonl:3")], [0, 2], encoder, [(1, "answer: is null, expected text")])
    documents = Documents([Part(table, lambda offset: f"a.jsonl:{offset + 1}")])
    found = arrange(documents, encoder, max_seq_len=64, packing=True)
    assert refusal(found, "2") == "a.jsonl:2: was skipped: answer: is null, expected text"
