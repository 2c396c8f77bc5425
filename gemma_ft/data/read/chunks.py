"""Consecutive rows of a source: what is read, hashed, encoded and cached at a time.

They are cut where their content says so, as rsync does it: rows that are added, changed or taken out leave the chunks
around theirs as they were, wherever these now lie.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from gemma_ft.data.read.bad_rows import BadRows
from gemma_ft.data.read.json_rows import MAX_ROW_BYTES, object_in

MEAN_ROWS = 8192
MOST_ROWS = 4 * MEAN_ROWS
MOST_BYTES = 16 * 2**20  # one row may be longer

Fields = dict[str, Any]


@dataclass(frozen=True)
class Chunk:
    """Some rows, as lines of JSON or as they were read."""

    source: str
    first: int  # number of its first line or row in the source, from 1
    unit: str  # what is counted: "" for lines, "row " for rows of a source that has no lines
    digest: str  # SHA-256 (hex) of what the rows say, wherever they lie
    lines: bytes | None = None
    numbered: tuple[tuple[int, Fields | str], ...] = ()  # (offset from `first`, fields, or why there are none)

    def where(self, offset: int) -> str:
        """The place of a row, as a user finds it: "path:line", or "path:row N"."""
        return f"{self.source}:{self.unit}{self.first + offset}"

    def bare(self) -> "Chunk":
        """Without its rows: what their places are counted from, and no more of it is held."""
        return replace(self, lines=None, numbered=())

    def at_origin(self) -> "Chunk":
        """The same rows with places ":0", ":1", ... : what is said of them then holds wherever they lie."""
        return replace(self, source="", first=0, unit="")

    def rows(self, bad: BadRows) -> list[tuple[int, Fields]]:
        """(offset from `first`, fields) of each row; what holds none is added to `bad`."""
        read: Iterable[tuple[int, Fields | str]] = self.numbered
        if self.lines is not None:
            lines = enumerate(self.lines.split(b"\n"))
            read = ((offset, object_in(line)) for offset, line in lines if line.strip())
        found: list[tuple[int, Fields]] = []
        for offset, fields in read:
            if isinstance(fields, str):
                bad.add(self.where(offset), fields)
            else:
                found.append((offset, fields))
        return found


def line_chunks(source: str, lines: Iterable[bytes]) -> Iterator[Chunk]:
    """Chunks of lines of JSON, without their line ends. Only LF ends a line: JSON text may hold U+2028 and others."""
    held: list[bytes] = []
    size, first = 0, 1
    for line in lines:
        held.append(line)
        size += len(line) + 1
        if _ends(line, len(held), size):
            yield _of_lines(source, first, held)
            first, held, size = first + len(held), [], 0
    if held:
        yield _of_lines(source, first, held)


def row_chunks(source: str, rows: Iterable[tuple[int, Fields | str]], *, unit: str = "") -> Iterator[Chunk]:
    """Chunks of (number, fields, or why the row has none), in ascending order of their numbers."""
    held: list[tuple[int, Fields | str]] = []
    told: list[bytes] = []
    size = 0
    for number, fields in rows:
        # what JSON has no words for can never become text: its kind is enough
        text = json.dumps(fields, ensure_ascii=False, default=_kind).encode("utf-8", "surrogatepass")
        held.append((number, fields))
        told.append(text)
        size += len(text)
        if _ends(text, len(held), size):
            yield _of_rows(source, unit, held, told)
            held, told, size = [], [], 0
    if held:
        yield _of_rows(source, unit, held, told)


def read_lines(file: Any) -> Iterator[bytes]:
    """The lines of a binary file without LF; of one that is too long for a row so much as shows that it is."""
    while line := file.readline(MAX_ROW_BYTES + 2):
        whole = line.endswith(b"\n")
        yield line[:-1] if whole else line
        while not whole and len(line) == MAX_ROW_BYTES + 2:
            line = file.readline(MAX_ROW_BYTES + 2)
            whole = line.endswith(b"\n")


def _kind(value: Any) -> str:
    return type(value).__name__


def _ends(row: bytes, rows: int, size: int) -> bool:
    return zlib.crc32(row) % MEAN_ROWS == 0 or rows >= MOST_ROWS or size >= MOST_BYTES


def _of_lines(source: str, first: int, held: list[bytes]) -> Chunk:
    lines = b"\n".join(held)
    return Chunk(source, first, "", hashlib.sha256(lines).hexdigest(), lines=lines)


def _of_rows(source: str, unit: str, held: list[tuple[int, Fields | str]], told: list[bytes]) -> Chunk:
    first = held[0][0]
    numbered = tuple((number - first, fields) for number, fields in held)
    placed = (b"%d %b" % (offset, text) for (offset, _), text in zip(numbered, told, strict=True))
    digest = hashlib.sha256(b"\n".join(placed)).hexdigest()
    return Chunk(source, first, unit, digest, numbered=numbered)
