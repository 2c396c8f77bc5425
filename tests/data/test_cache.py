"""Encoded rows on disk: found again by content alone, whole or made anew, the same from one process or several."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from gemma_ft.data.encode import cache as room
from gemma_ft.data.encode import encode_rows
from gemma_ft.data.encode.cache import Cache, items_at
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.documents import Documents
from gemma_ft.data.encode.encode_rows import Reading
from gemma_ft.data.read import chunks
from gemma_ft.data.read.bad_rows import BadRows
from gemma_ft.data.read.parse_rows import parse_rows
from gemma_ft.data.read.sources import read_chunks, read_rows
from gemma_ft.errors import DataError, DiskError

COLUMNS: dict[str, str] = {}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "MEAN_ROWS", 8)
    monkeypatch.setattr(chunks, "MOST_ROWS", 32)


def lines(count: int, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return [
        json.dumps({"question": f"What is {n}?" + " Well" * chance.randrange(9), "answer": f"It is {chance.random()}."})
        for n in range(count)
    ]


@pytest.fixture
def written(tmp_path: Path) -> Callable[[list[str]], str]:
    def write(rows: list[str]) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")
        return str(path)

    return write


def reading(encoder: ChatEncoder, form: str = "prompt_completion") -> Reading:
    return Reading(form, COLUMNS, encoder)


def encodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The chunks that are encoded from now on, by their first row's place."""
    made: list[str] = []
    original = room.encode_chunk

    def encode(how: Reading, chunk: Any, path: Path) -> None:
        made.append(chunk.where(0))
        original(how, chunk, path)

    monkeypatch.setattr(room, "encode_chunk", encode)
    return made


def test_rows_that_an_older_build_encoded_are_encoded_again(
    written: Callable[[list[str]], str], encoder: ChatEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layout 4 (a3dff15) read rows otherwise (no system beside messages) and has no remarks."""
    source, cache = written(lines(4)), Cache(tmp_path / "cache", 1)
    with monkeypatch.context() as older:
        older.setattr(encode_rows, "LAYOUT", 4)
        documents_of(cache, source, encoder)
    made = encodings(monkeypatch)
    documents_of(cache, source, encoder)
    assert made
    made.clear()
    documents_of(cache, source, encoder)
    assert made == []


def documents_of(cache: Cache, source: str, encoder: ChatEncoder) -> Documents:
    """All good rows of a source, out of the cache. Raises: DataError for bad ones."""
    bad = BadRows()
    found = cache.documents(read_chunks(source), reading(encoder), bad)
    bad.raise_if_any()
    return found


def said(documents: Documents) -> list[Any]:
    """Everything that documents hold."""
    return [
        [*(part.tolist() for part in documents.cut(number, 0, 10**6)), documents.where(number)]
        for number in range(len(documents))
    ]


def test_what_comes_back_is_what_memory_would_hold(
    encoder: ChatEncoder, written: Callable[[list[str]], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written([*lines(100), "", '{"question": " ", "answer": "empty"}', *lines(60, seed=1)])
    cache, made = Cache(tmp_path / "cache", 1), encodings(monkeypatch)
    items = parse_rows(read_rows(source))
    expected = Documents.of(items, encoder)
    for _ in range(2):
        found = documents_of(cache, source, encoder)
        assert said(found) == said(expected)
        assert (found.items, len(found)) == (161, 160)
        assert found.contents() == expected.contents()
        assert all((found.column(name) == expected.column(name)).all() for name in ("trained", "terminators", "chat"))
    assert 8 < len(made) == len(set(made)) == len(list(read_chunks(source))), "once each"
    wanted = [0, 7, 55, 99, 100, 159]
    assert items_at(read_chunks(source), reading(encoder), found, wanted) == [
        items[number + (number >= 100)] for number in wanted
    ]


@pytest.mark.parametrize("change", ["changed", "added", "taken out", "moved to the end"])
def test_a_change_of_one_row_encodes_its_neighbourhood_only(
    encoder: ChatEncoder,
    written: Callable[[list[str]], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
) -> None:
    rows, cache = lines(300), Cache(tmp_path / "cache", 1)
    documents_of(cache, written(rows), encoder)
    row = json.dumps({"question": "New?", "answer": "Yes."})
    if change == "changed":
        rows[150] = row
    elif change == "added":
        rows[150:150] = [row]
    else:
        gone = rows.pop(150)
        rows += [gone] if change.startswith("moved") else []
    made = encodings(monkeypatch)
    found = documents_of(cache, written(rows), encoder)
    assert 1 <= len(made) <= 3
    assert said(found) == said(Documents.of(parse_rows(read_rows(written(rows))), encoder))


def test_what_decides_the_tokens_decides_the_file(
    encoders: dict[str, ChatEncoder], written: Callable[[list[str]], str], tmp_path: Path
) -> None:
    chunk = next(iter(read_chunks(written(lines(5)))))
    one = encoders["fold"]
    other = [
        Reading("text", {}, one).key(chunk),
        Reading("prompt_completion", {"prompt": "{question}", "completion": "{answer}"}, one).key(chunk),
        *(Reading("prompt_completion", {}, encoders[policy]).key(chunk) for policy in ("drop", "error")),
        Reading("prompt_completion", {}, one).key(next(iter(read_chunks(written(lines(6)))))),
    ]
    assert len({*other, Reading("prompt_completion", {}, one).key(chunk)}) == len(other) + 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied"])
def test_a_damaged_file_is_made_anew(
    encoder: ChatEncoder, written: Callable[[list[str]], str], tmp_path: Path, damage: str
) -> None:
    source, cache = written(lines(50)), Cache(tmp_path / "cache", 1)
    expected = said(documents_of(cache, source, encoder))
    files = sorted((tmp_path / "cache").rglob("*.arrow"))
    assert len(files) > 2
    before = {path: path.read_bytes() for path in files}
    for path, data in before.items():
        at = len(data) // 2
        flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        path.write_bytes({"cut": data[:at], "flipped": flipped, "emptied": b""}[damage])
    assert said(documents_of(cache, source, encoder)) == expected
    assert {path: path.read_bytes() for path in files} == before
    assert sorted((tmp_path / "cache").rglob("*.*")) == files, "nothing half-written is left"


def test_bad_rows_are_told_each_time_and_wherever_they_lie(
    encoder: ChatEncoder, written: Callable[[list[str]], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, cache, made = lines(40), Cache(tmp_path / "cache", 1), encodings(monkeypatch)
    for number in (3, 20, 37):
        rows[number] = '{"question": 3, "answer": "x"}'
    source = written(rows)
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            documents_of(cache, source, encoder)
        assert str(caught.value).splitlines() == [
            f"{source}:{number}: 'question' is a number, expected text" for number in (4, 21, 38)
        ]
    before = len(made)
    bad = BadRows()
    found = cache.documents(read_chunks(written(["", *rows])), reading(encoder), bad)
    assert [where for where, _ in bad.rows] == [f"{source}:{number}" for number in (5, 22, 39)]
    assert len(found) == 37
    assert len(made) <= before + 1, "what lies further down is the same"


def test_a_limit_stops_the_reading(
    encoder: ChatEncoder, written: Callable[[list[str]], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = encodings(monkeypatch)
    found = Cache(tmp_path / "cache", 1).documents(
        read_chunks(written(lines(300))), reading(encoder), BadRows(), limit=20
    )
    assert 20 <= len(found) < 20 + chunks.MOST_ROWS
    assert len(made) == len(found.parts)


def test_several_processes_give_what_one_gives(
    encoder: ChatEncoder, written: Callable[[list[str]], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "ALONE", 1)
    rows = lines(80)
    source, made = written(rows), encodings(monkeypatch)
    several = documents_of(Cache(tmp_path / "several", 2), source, encoder)
    assert len(made) == 1, "the others were encoded elsewhere"
    assert said(several) == said(documents_of(Cache(tmp_path / "one", 1), source, encoder))
    names = [sorted(path.name for path in (tmp_path / name).rglob("*.arrow")) for name in ("one", "several")]
    assert names[0] == names[1]


def test_workers_that_die_cost_time_alone(
    encoder: ChatEncoder, written: Callable[[list[str]], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dead:
        def __init__(self, *_: Any) -> None: ...

        def submit(self, *_: Any) -> Any:
            raise BrokenProcessPool

        def shutdown(self, **_: Any) -> None: ...

    monkeypatch.setattr(room, "ALONE", 1)
    monkeypatch.setattr(room, "ProcessPoolExecutor", Dead)
    source = written(lines(80))
    found = documents_of(Cache(tmp_path / "cache", 2), source, encoder)
    assert said(found) == said(Documents.of(parse_rows(read_rows(source)), encoder))


def test_a_folder_that_cannot_be_written_is_told(
    encoder: ChatEncoder, written: Callable[[list[str]], str], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DiskError) as caught:
        documents_of(Cache(tmp_path / "cache", 1), written(lines(3)), encoder)
    assert str(caught.value).endswith("; set GEMMA_FT_CACHE to a folder with room")
