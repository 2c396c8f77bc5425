"""Streamed rows: each once in a pass, mixed, and the same from wherever reading begins."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from gemma_ft.data.conversation import Conversation, Turn
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.encode_rows import Reading
from gemma_ft.data.pack import stream as stream_module
from gemma_ft.data.pack.stream import Arranging, Block, Cursor, Stream, StreamSource
from gemma_ft.data.pack.streamed import StreamedExamples
from gemma_ft.data.read.chunks import Chunk
from gemma_ft.data.read.sources import read_chunks
from gemma_ft.errors import DataError

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 40 documents, which sources give ten at a time, in chunks of about 16 rows."""
    monkeypatch.setattr(stream_module, "BLOCK_DOCUMENTS", 40)
    monkeypatch.setattr(stream_module, "GRAB", 10)
    monkeypatch.setattr("gemma_ft.data.read.chunks.MEAN_ROWS", 16)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def rows(name: str, count: int, bad: tuple[int, ...] = ()) -> Path:
        path = tmp_path / f"{name}.jsonl"
        lines = [{"question": f"{name} {n}?", "answer": None if n in bad else f"{n}."} for n in range(1, count + 1)]
        path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        return path

    return rows


def source(path: Path, encoder: ChatEncoder, **changes: Any) -> StreamSource:
    reading = Reading("prompt_completion", changes.pop("columns", {}), encoder)
    facts = {"most": None, "repeats": 1.0, "rate": 1.0, "endless": False, **changes}
    return StreamSource(path.stem, partial(read_chunks, str(path)), reading, **facts)


def stream_of(*sources: StreamSource, **changes: Any) -> Stream:
    facts = {"arranging": Arranging(64, True, "auto"), "seed": 1, "held_out": frozenset(), "skip_bad_rows": False}
    return Stream(sources, **{**facts, **changes})


def one_pass(stream: Stream, number: int = 0) -> list[Block]:
    found: list[Block] = []
    for block in stream.blocks(Cursor()):
        if block.cursor.passed > number:
            return [one for one in found if one.cursor.passed == number]
        found.append(block)
    raise AssertionError("a stream has no end")


def wheres(blocks: list[Block]) -> list[str]:
    """Places of documents in the order of training."""
    found = []
    for block in blocks:
        for row in block.order:
            found += [Path(one).name for one in block.prepared.examples.wheres(row)]
    return found


def examples_of(blocks: Iterator[Block], count: int) -> list[Any]:
    found: list[Any] = []
    for block in blocks:
        found += [block.prepared.examples[row] for row in block.order]
        if len(found) >= count:
            return found[:count]
    raise AssertionError("a stream has no end")


def test_each_row_comes_once_in_a_pass_and_in_another_order_in_the_next(write: Write, encoder: ChatEncoder) -> None:
    stream = stream_of(source(write("a", 130), encoder))
    first, second = wheres(one_pass(stream)), wheres(one_pass(stream, 1))
    assert Counter(first) == Counter(second) == Counter(f"a.jsonl:{n}" for n in range(1, 131))
    assert len(one_pass(stream)) == 4
    assert first != second
    assert first != sorted(first, key=lambda where: int(where.partition(":")[2]))


def test_sources_are_mixed_at_their_rates_and_all_are_read(write: Write, encoder: ChatEncoder) -> None:
    stream = stream_of(source(write("a", 150), encoder, rate=3.0), source(write("b", 50), encoder))
    blocks = one_pass(stream)
    counts = [Counter(where[0] for where in wheres([block])) for block in blocks]
    assert all(one["a"] in (20, 30, 40) and one["b"] in (0, 10, 20) for one in counts), counts
    assert sum(counts, Counter()) == {"a": 150, "b": 50}


def test_weighted_sources_begin_again_each_by_itself(write: Write, encoder: ChatEncoder) -> None:
    """The long one is read to its end, however often the short one begins again, and they keep their shares."""
    a, b = (source(write(name, count), encoder, endless=True) for name, count in (("a", 200), ("b", 30)))
    blocks = list(islice(stream_of(a, b).blocks(Cursor()), 10))
    assert {block.cursor.passed for block in blocks} == {0}
    counts = Counter(wheres(blocks))
    assert sum(n for where, n in counts.items() if where[0] == "a") == 200
    assert {n for where, n in counts.items() if where[0] == "a"} == {1}
    assert {n for where, n in counts.items() if where[0] == "b"} <= {6, 7}
    for block in blocks:
        mixed = Counter(where[0] for where in wheres([block]))
        assert mixed == {"a": 20, "b": 20}


@pytest.mark.parametrize("endless", [True, False])
def test_a_stream_of_nothing_ends_with_a_reason(write: Write, encoder: ChatEncoder, endless: bool) -> None:
    columns = {"prompt": "{question}", "completion": "{answer}", "weight": "{w}"}
    path = write("a", 90)
    lines = [json.loads(line) | {"w": 0} for line in path.read_text().splitlines()]
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match=r"a: none of the \d+ rows can be trained on: \d+ have the weight 0"):
        next(stream_of(source(path, encoder, columns=columns, endless=endless)).blocks(Cursor()))
    path.write_text("\n".join(map(json.dumps, [*lines, {"question": "b?", "answer": "b.", "w": 1}])))
    found = next(stream_of(source(path, encoder, columns=columns, endless=endless)).blocks(Cursor()))
    assert len(found.order) == 1, "rows that are not trained do not end a stream"


def test_bad_rows_behind_the_cap_are_no_fault(write: Write, encoder: ChatEncoder) -> None:
    assert len(wheres(one_pass(stream_of(source(write("a", 30, bad=(6,)), encoder, most=5))))) == 5
    with pytest.raises(DataError, match=r"a\.jsonl:6"):
        one_pass(stream_of(source(write("a", 30, bad=(6,)), encoder, most=6)))


def test_repeats_caps_and_shares(write: Write, encoder: ChatEncoder) -> None:
    twice = source(write("a", 30), encoder, repeats=2.0, most=20)
    half = source(write("b", 400), encoder, repeats=0.5)
    counts = Counter(wheres(one_pass(stream_of(twice, half))))
    assert {where: n for where, n in counts.items() if where[0] == "a"} == {f"a.jsonl:{n}": 2 for n in range(1, 21)}
    shared = {where for where in counts if where[0] == "b"}
    assert 150 < len(shared) < 250
    assert shared == {where for where in wheres(one_pass(stream_of(twice, half), 1)) if where[0] == "b"}


@pytest.mark.parametrize("skipped", [1, 3, 4, 7, 9])
def test_any_block_is_where_reading_may_begin(write: Write, encoder: ChatEncoder, skipped: int) -> None:
    sources = [source(write("a", 90), encoder, rate=2.0), source(write("b", 31), encoder, repeats=1.5)]
    blocks = list(islice(stream_of(*sources).blocks(Cursor()), 12))
    cursor = Cursor.from_dict(json.loads(json.dumps(blocks[skipped].cursor.as_dict())))
    again = list(islice(stream_of(*sources).blocks(cursor), 12 - skipped))
    for one, other in zip(blocks[skipped:], again, strict=True):
        assert one.cursor == other.cursor
        assert wheres([one]) == wheres([other])
        assert [one.prepared.examples[row] for row in one.order] == [
            other.prepared.examples[row] for row in other.order
        ]


def test_held_out_rows_are_left_out_and_counted(write: Write, encoder: ChatEncoder) -> None:
    held = [Conversation("", (Turn("user", f"a {n}?"), Turn("assistant", f"{n}."))) for n in (3, 50)]
    stream = stream_of(source(write("a", 60), encoder), held_out=frozenset(map(encoder.content_hash, held)))
    blocks = one_pass(stream)
    assert {f"a.jsonl:{n}" for n in range(1, 61)} - set(wheres(blocks)) == {"a.jsonl:3", "a.jsonl:50"}
    assert sum(block.prepared.stats.overlapping for block in blocks) == 2
    assert sum(block.prepared.stats.rows for block in blocks) == 58


def test_bad_rows_end_the_stream_where_they_are_read(write: Write, encoder: ChatEncoder) -> None:
    blocks = stream_of(source(write("a", 200, bad=(150,)), encoder)).blocks(Cursor())
    good = wheres([next(blocks), next(blocks)])
    assert len(good) == 80
    with pytest.raises(DataError, match=r"a\.jsonl:150: 'answer' is null, expected text"):
        list(islice(blocks, 3))


def test_bad_rows_are_skipped_within_the_budget(write: Write, encoder: ChatEncoder) -> None:
    one = stream_of(source(write("a", 200, bad=(150,)), encoder), skip_bad_rows=True)
    bad = [place for block in one_pass(one) for place, _ in block.bad.rows]
    assert [Path(where).name for where in bad] == ["a.jsonl:150"]
    thrice = stream_of(source(write("a", 200, bad=(150,)), encoder, repeats=3.0), skip_bad_rows=True)
    assert sum(block.bad.count for block in one_pass(thrice)) == 1, "a row is told once in a pass"
    many = stream_of(source(write("b", 200, bad=(20, 150)), encoder), skip_bad_rows=True)
    with pytest.raises(DataError, match=r"more than data\.on_bad_row: skip leaves out"):
        one_pass(many)


def test_nothing_to_train_on_is_told(write: Write, encoder: ChatEncoder) -> None:
    with pytest.raises(DataError, match="a: there is no row to train on"):
        next(stream_of(source(write("a", 0), encoder)).blocks(Cursor()))


def examples(stream: Stream, total: int = 60, behind: int = 8) -> StreamedExamples:
    return StreamedExamples(stream, total=total, behind=behind)


def test_examples_go_forward_and_a_little_back(write: Write, encoder: ChatEncoder) -> None:
    stream = stream_of(source(write("a", 90), encoder))
    expected = examples_of(stream.blocks(Cursor()), 60)
    found = examples(stream)
    assert len(found) == 60
    assert [found[row] for row in range(60)] == expected
    assert [found.lengths[row] for row in (0, 59)] == [len(expected[row]["input_ids"]) for row in (0, 59)]
    assert found[59 - 8 : 60] == expected[59 - 8 :]
    assert found[0] == expected[0], "what is far behind is read again"
    assert found[59] == expected[59]
    with pytest.raises(IndexError):
        found[60]


def test_a_cursor_goes_on_with_its_example(write: Write, encoder: ChatEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stream_of(source(write("a", 90), encoder))
    found = examples(stream)
    whole = [found[row] for row in range(60)]
    row = next(row for row in range(30, 60) if found.state(row)["cursor"]["places"][0]["chunk"])
    state = json.loads(json.dumps(found.state(row)))
    cursor = state["cursor"]
    encoded: list[Chunk] = []
    original = stream_module.encoded_chunk
    monkeypatch.setattr(
        stream_module, "encoded_chunk", lambda reading, chunk: encoded.append(chunk) or original(reading, chunk)
    )
    again = examples(stream)
    for reading_ahead in [thread for thread in threading.enumerate() if thread.name == "stream"]:
        reading_ahead.join()
    encoded.clear()
    again.go_on(state)
    begun = list(read_chunks(str(write("a", 90))))[cursor["places"][0]["chunk"]]
    assert encoded[0].first == begun.first > 1, "what was trained is not encoded again"
    assert cursor["first"] > 0
    assert again[row:60] == whole[row:]
    assert again.stats == found.stats, "what was read before counts as well"
    assert (again.length_counts == found.length_counts).all()
    assert again.state(60) == found.state(60)


def test_counts_are_of_what_was_read_each_block_once(write: Write, encoder: ChatEncoder) -> None:
    found = examples(stream_of(source(write("a", 90), encoder)), total=1000)
    assert found.stats.rows == 40
    rows = sum(block.prepared.stats.packed_rows for block in one_pass(found.stream))
    assert found[rows - 1]
    assert found[0]
    assert found[rows - 1]
    assert found.stats.rows == 90
    assert found.length_counts.sum() == 90


def test_the_fingerprint_knows_settings_and_first_rows(write: Write, encoder: ChatEncoder) -> None:
    path = write("a", 30)
    told = stream_of(source(path, encoder)).fingerprint()
    assert told == stream_of(source(path, encoder)).fingerprint()
    assert told != stream_of(source(path, encoder), seed=2).fingerprint()
    assert told != stream_of(source(path, encoder, repeats=2.0)).fingerprint()
    assert told != stream_of(source(path, encoder), source(path, encoder, rate=2.0)).fingerprint()
    assert told != stream_of(replace(source(path, encoder), split="train")).fingerprint(), "other files were read once"
    write("a", 31)
    assert told == stream_of(source(path, encoder)).fingerprint(), "rows may be added at the end"
    path.write_text(path.read_text().replace("a 1?", "b 1?"))
    assert told != stream_of(source(path, encoder)).fingerprint()


def test_nothing_is_read_ahead_that_no_step_needs(write: Write, encoder: ChatEncoder) -> None:
    found = examples(stream_of(source(write("a", 90), encoder)), total=4)
    assert [found[row] for row in range(4)]
    assert found._coming is None


def test_a_source_that_gives_nothing_can_be_left(write: Write, encoder: ChatEncoder) -> None:
    path, more = write("a", 40), threading.Event()

    def chunks() -> Iterator[Chunk]:
        yield from read_chunks(str(path))
        more.wait()

    found = examples(stream_of(replace(source(path, encoder), chunks=chunks)), total=500)

    def leave() -> None:
        raise InterruptedError

    found.waiting = leave
    with pytest.raises(InterruptedError):
        found[499]
    more.set()
