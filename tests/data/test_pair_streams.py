"""Streamed pairs: each row once in a pass with both its halves, wherever a chunk, a grab or a block ends."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.encode_rows import Reading, encoded_chunk
from gemma_ft.data.pack import stream as stream_module
from gemma_ft.data.pack.stream import Arranging, Cursor, Stream, StreamSource
from gemma_ft.data.read.sources import read_chunks
from tests.data.test_pairs_to_batches import one_prompt, pair

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def rows(name: str, count: int, *, bad: tuple[int, ...] = (), prompts: int = 10_000) -> Path:
        path = tmp_path / f"{name}.jsonl"
        lines = [
            {"prompt": f"{name} {n % prompts}?", "chosen": f"Yes {n}.", "rejected": "" if n in bad else f"No {n}, no."}
            for n in range(1, count + 1)
        ]
        path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        return path

    return rows


def source(path: Path, encoder: ChatEncoder, rows: Any = "pairs", **changes: Any) -> StreamSource:
    reading = Reading("preference", {}, encoder, rows)
    facts = {"most": None, "repeats": 1.0, "rate": 1.0, "endless": False, **changes}
    return StreamSource(path.stem, partial(read_chunks, str(path)), reading, **facts)


def first_pass(*sources: StreamSource, **changes: Any) -> list[Any]:
    facts = {"arranging": Arranging(64, True, "auto"), "seed": 1, "held_out": frozenset(), "skip_bad_rows": False}
    stream = Stream(sources, **{**facts, **changes})
    return list(itertools.takewhile(lambda block: block.cursor.passed == 0, stream.blocks(Cursor())))


def halves_of(block: Any) -> list[tuple[str, str]]:
    """(where, what is trained of it) of the halves of each example of a block, checked to be of one row."""
    found = []
    for row in block.order:
        example, (one, other) = block.prepared.examples[row], block.prepared.examples.wheres(row)
        assert (example["sides"], one) == ([1, 0], other)
        one_prompt(example)
        found.append(one)
    return found


@pytest.mark.parametrize("chunk", [1, 3, 16])
@pytest.mark.parametrize("grab", [1, 2, 7, 10])
@pytest.mark.parametrize("most", [None, 1, 7, 34])
def test_no_boundary_separates_halves(
    encoder: ChatEncoder, write: Write, monkeypatch: pytest.MonkeyPatch, chunk: int, grab: int, most: int | None
) -> None:
    """Blocks, grabs, chunks and a limit of rows, of any size: each row comes once, with both its halves."""
    monkeypatch.setattr(stream_module, "BLOCK_DOCUMENTS", 13)
    monkeypatch.setattr(stream_module, "GRAB", grab)
    monkeypatch.setattr("gemma_ft.data.read.chunks.MEAN_ROWS", chunk)
    one, other = (write(name, 21) for name in "ab")
    limit = most and most * 2
    blocks = first_pass(source(one, encoder, most=limit), source(other, encoder, most=limit, rate=0.5))
    found = [where for block in blocks for where in halves_of(block)]
    assert len(found) == len(set(found)) == 2 * min(21, most or 21)
    assert sum(block.prepared.stats.rows for block in blocks) == len(found)


def test_a_stream_goes_on_with_whole_pairs(encoder: ChatEncoder, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "BLOCK_DOCUMENTS", 13)
    monkeypatch.setattr(stream_module, "GRAB", 7)
    path = write("a", 40)
    facts: dict[str, Any] = {
        "arranging": Arranging(64, False, "auto"), "seed": 1, "held_out": frozenset(), "skip_bad_rows": False
    }  # fmt: skip
    stream = Stream([source(path, encoder)], **facts)
    blocks = list(itertools.islice(stream.blocks(Cursor()), 6))
    for at in (1, 3, 5):
        again = next(stream.blocks(Cursor.from_dict(json.loads(json.dumps(blocks[at].cursor.as_dict())))))
        assert halves_of(again) == halves_of(blocks[at])


def test_streamed_pairs_leave_out_held_out_prompts_and_repeat_a_fraction(
    encoder: ChatEncoder, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "BLOCK_DOCUMENTS", 20)
    path = write("a", 40, prompts=10)
    refused = pair("a 3?", "anything", "else")
    blocks = first_pass(source(path, encoder), held_out=frozenset([encoder.content_hash(refused)]))
    found = [where for block in blocks for where in halves_of(block)]
    assert len(found) == 36
    assert not {where for where in found if int(where.rpartition(":")[2]) % 10 == 3}
    half = [where for block in first_pass(source(path, encoder, repeats=0.5)) for where in halves_of(block)]
    prompts = {int(where.rpartition(":")[2]) % 10 for where in half}
    assert 0 < len(prompts) < 10
    assert len(half) == 4 * len(prompts)  # by prompt, as a split is


def test_a_stream_of_labelled_answers(encoder: ChatEncoder, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pairs each half is an answer of its own, and a limit counts answers."""
    monkeypatch.setattr(stream_module, "BLOCK_DOCUMENTS", 13)
    monkeypatch.setattr(stream_module, "GRAB", 5)
    blocks = first_pass(source(write("a", 20), encoder, "labelled", most=31))
    sides = [block.prepared.examples[row]["sides"] for block in blocks for row in block.order]
    assert sorted(sides) == [[0]] * 15 + [[1]] * 16


@pytest.mark.parametrize("rows", ["pairs", "labelled"])
def test_a_slice_of_a_chunk_counts_each_row_once(encoder: ChatEncoder, write: Write, rows: Any) -> None:
    """Bad rows and empty halves beside good ones; a chunk without a good row is none."""
    reading = Reading("preference", {}, encoder, rows)
    for chunk in read_chunks(str(write("a", 3, bad=(1, 2, 3)))):
        table = encoded_chunk(reading, chunk)
        assert len(table) == 0
    for chunk in read_chunks(str(write("b", 5, bad=(2,)))):
        table = encoded_chunk(reading, chunk)
        assert len(table) == 8
        assert table.column("side").to_pylist() == [1, 0] * 4
        offsets = table.column("offset").to_pylist()
        assert offsets[0::2] == offsets[1::2]
        assert len(set(offsets)) == 4
