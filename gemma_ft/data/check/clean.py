"""Cleaned copies of sources: rows as they were, without those that are bad, damaged, repeated or held out as well.

Each copy is a .jsonl file; changes.log beside them has a line for every change. What is left out here is what
survey.py tells, by the same functions.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from gemma_ft.data.check.anomalies import damage
from gemma_ft.data.check.rows import CheckedRow, CountedBadRows, Places, RowSource, repeats, rows_in
from gemma_ft.data.read.chunks import Chunk
from gemma_ft.data.read.files import TABLES, files_at
from gemma_ft.data.read.sources import UTF8_MARK
from gemma_ft.errors import DataError

CHANGES = "changes.log"
BLOCK = 2**20
BAD, DAMAGED, HELD_OUT, REPEATED = "bad row", "U+FFFD", "held out as well", "repeats another row"
Change = Callable[[str, str, str], None]  # where, what, why


@dataclass
class Copy:
    """A source and its copy: rows there were, rows there are, those left out by reason."""

    source: RowSource
    name: str  # of the file
    rows: int = 0
    kept: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


def copy_clean(
    sources: Sequence[RowSource], folder: Path, progress: Callable[[int], None] = lambda rows: None
) -> list[Copy]:
    """Fills a folder with a copy of each source and changes.log; the copies in the order of their sources.

    Held-out rows are copied first: training rows that are among them are left out.
    Raises: DataError when a source cannot be read to its end, or nothing of it is left.
    """
    copies = [Copy(source, name) for source, name in zip(sources, _names(sources), strict=True)]
    held_out: set[bytes] = set()
    with (folder / CHANGES).open("w", encoding="utf-8", errors="backslashreplace") as changes:

        def change(where: str, what: str, why: str) -> None:
            line = json.dumps({"where": where, "what": what, "why": why}, ensure_ascii=False)
            changes.write(f"{line}\n")

        for side in ("eval", "train"):
            places, seen = Places(), dict[bytes, int]()
            for copy in copies:
                if copy.source.side != side:
                    continue
                known = _Known(seen, held_out if side == "train" else frozenset(), places)
                with (folder / copy.name).open("wb") as file:
                    for apart in _copy(copy, file, known, change, progress):
                        if side == "eval":
                            held_out.update(apart)
                if not copy.kept:
                    raise DataError(f"{copy.source.name}: no row of it would be left; gemma-ft data check says why")
    return copies


@dataclass(frozen=True)
class _Known:
    """The items of rows that were copied before, and what is held out."""

    seen: dict[bytes, int]
    held_out: Set[bytes]
    places: Places

    def fault(self, row: CheckedRow, digests: Sequence[bytes], apart: Sequence[bytes]) -> tuple[str, str] | None:
        """(in a word, in more of them) why a row is left out, or None. `apart`: as of CheckedRow."""
        if any("replacement_character" in damage(text) for text in row.texts()):
            return DAMAGED, "holds U+FFFD, the sign for a character that was lost"
        if any(digest in self.held_out for digest in apart):
            what = "it is" if apart == digests else "its prompt is"
            return HELD_OUT, f"{what} held out for evaluation as well"
        first = repeats(digests, self.seen)
        return None if first is None else (REPEATED, f"repeats {self.places.where(first)}")


def _copy(
    copy: Copy, file: BinaryIO, known: _Known, change: Change, progress: Callable[[int], None]
) -> Iterator[list[bytes]]:
    """Yields of each row that is copied what may not be both trained and held out."""

    def bad_row(where: str, reason: str) -> None:
        bad.add(where)
        change(where, "row left out", reason)

    name = None
    for chunk in copy.source.chunks():
        if chunk.source != name:
            name = chunk.source
            _line_ends(name, change)
        bad: set[str] = set()
        rows = rows_in(chunk, copy.source.reading, CountedBadRows(bad_row))
        known.places.begin(chunk)
        written = dict(_written(chunk))
        for row in rows:
            where = chunk.where(row.offset)
            if where in bad:  # one of its items could not be read
                continue
            digests, apart = (of(copy.source.reading.encoder) for of in (row.digests, row.apart))
            fault = known.fault(row, digests, apart)
            if fault is not None:
                copy.left_out[fault[0]] += 1
                change(where, "row left out", fault[1])
                continue
            file.write(written[row.offset] + b"\n")
            copy.kept += 1
            number = known.places.add(row.offset)
            for digest in digests:
                known.seen.setdefault(digest, number)
            yield apart
        if bad:
            copy.left_out[BAD] += len(bad)
        copy.rows += len(bad | {chunk.where(row.offset) for row in rows})
        progress(len(rows))


def _written(chunk: Chunk) -> Iterator[tuple[int, bytes]]:
    """(offset, line of JSON) of each row of a chunk: the very bytes where it was one."""
    if chunk.lines is None:
        yield from ((offset, _as_line(fields)) for offset, fields in chunk.numbered if not isinstance(fields, str))
    else:
        yield from ((offset, line.removesuffix(b"\r")) for offset, line in enumerate(chunk.lines.split(b"\n")))


def _as_line(fields: dict[str, Any]) -> bytes:
    text = json.dumps(fields, ensure_ascii=False, default=str)  # dates and the like, which JSON does not have, as text
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a surrogate pair in a field that is not read
        return json.dumps(fields, default=str).encode()


def _line_ends(name: str, change: Change) -> None:
    """Tells what a file of text has at its beginning and its line ends that the copy has not."""
    path = Path(name)
    found = files_at(name) if path.is_file() else None
    if not found or found[0].suffix in TABLES:
        return
    with found[0].open() as file:
        block = file.read(BLOCK)
        marked, pairs = block.startswith(UTF8_MARK), 0
        while block:
            pairs += block.count(b"\r\n")
            last, block = block[-1:], file.read(BLOCK)
            pairs += last == b"\r" and block[:1] == b"\n"
    if marked:
        change(name, "byte order mark left out", "UTF-8 needs none")
    if pairs:
        change(name, f"{pairs:,} line ends CRLF made LF", "lines of JSON end in LF")


def _names(sources: Sequence[RowSource]) -> list[str]:
    """train.jsonl and eval.jsonl; with a number where there are several."""
    sides = [source.side for source in sources]
    return [
        f"{side}.jsonl" if sides.count(side) == 1 else f"{side}-{sides[:at].count(side) + 1}.jsonl"
        for at, side in enumerate(sides)
    ]
