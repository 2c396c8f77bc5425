"""Files and hub data sets -> rows. Each row knows its place, so that every later complaint can name it.

Defined behaviour: UTF-8, with or without a byte order mark; CRLF and LF line ends; blank lines are skipped; what is
not UTF-8, or not one object per row, is refused with its line.
"""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from gemma_ft.data.read.bad_rows import BadRows
from gemma_ft.data.read.chunks import Chunk, line_chunks, read_lines, row_chunks
from gemma_ft.data.read.files import TABLES, DataFile, did_you_mean, files_at, looks_mistyped
from gemma_ft.data.read.json_rows import begins_a_document, holds_a_list, objects_in
from gemma_ft.data.read.tables import csv_rows, table_rows
from gemma_ft.errors import DataError
from gemma_ft.system.hub import read_hub_records

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
UTF8_MARK = b"\xef\xbb\xbf"
LFS_POINTER = b"version https://git-lfs"
HEAD_BYTES = 64


@dataclass(frozen=True)
class Row:
    """One row as it was read: `where` is "path:line" ("path:row N" where a source has no lines)."""

    where: str
    fields: dict[str, Any]


def read_rows(source: str, *, split: str = "train", revision: str | None = None) -> list[Row]:
    """All rows of a source, in order: of a file (see data/read/files.py; .txt is one row), of all files in a folder or
    that fit a pattern, on this machine or behind a URL such as s3://, or of a hub data set.

    A hub data set is "owner/name", or "owner/name:config" where it has several; `split` is also that of a folder whose
    files name splits, `revision` the hub's.

    Raises: DataError naming file and line of up to five bad rows, or saying why the source cannot be read.
    """
    bad = BadRows()
    rows = [row for chunk in read_chunks(source, split=split, revision=revision) for row in rows_of(chunk, bad)]
    bad.raise_if_any()
    if not rows:
        raise DataError(f"{source}: holds no rows")
    return rows


def rows_of(chunk: Chunk, bad: BadRows) -> list[Row]:
    """The rows of a chunk with their places; what holds none is added to `bad`."""
    return [Row(chunk.where(offset), fields) for offset, fields in chunk.rows(bad)]


def read_chunks(
    source: str, *, split: str = "train", revision: str | None = None, streaming: bool = False
) -> Iterator[Chunk]:
    """The rows of a source as `read_rows` gives them, a chunk at a time: lines of JSON, parquet and hub data sets need
    not fit into memory. `streaming`: a hub data set is not downloaded, it comes row by row.

    Raises: DataError for what cannot be read; rows that hold no object are found by whoever opens the chunk.
    """
    files = files_at(source, split)
    if files is not None:
        for file in files:
            yield from _file_chunks(file)
    elif HUB_ID.fullmatch(source) and not looks_mistyped(source):
        records = read_hub_records(source, split=split, revision=revision, streaming=streaming)
        yield from row_chunks(f"{source}[{split}]", enumerate(records, start=1), unit="row ")
    else:
        raise DataError(f"{source}: no such file{did_you_mean(source)}")


def _file_chunks(file: DataFile) -> Iterator[Chunk]:
    with file.open() as opened:
        lines = io.BufferedReader(cast(Any, opened)) if not hasattr(opened, "peek") else opened
        head = lines.peek(HEAD_BYTES)[:HEAD_BYTES]
        if head.startswith(LFS_POINTER):
            raise DataError(f"{file.name}: is a pointer of Git LFS, not the file; fetch it (git lfs pull)")
        if file.suffix in TABLES:
            yield from row_chunks(file.name, table_rows(file, lines), unit="row ")
            return
        if head.startswith(UTF16_MARKS):
            raise DataError(f"{file.name}: is UTF-16; save it as UTF-8")
        if head.startswith(UTF8_MARK):
            lines.read(len(UTF8_MARK))
        if file.suffix in (".jsonl", ".ndjson") and not begins_a_document(head.removeprefix(UTF8_MARK)):
            yield from line_chunks(file.name, read_lines(lines))
            return
        data = lines.read()
    if file.suffix in (".json", ".jsonl", ".ndjson"):
        yield from _json_chunks(file.name, data)
        return
    text = _decode(file.name, data)
    if file.suffix in (".csv", ".tsv"):
        yield from row_chunks(file.name, csv_rows(file.name, text, tabs=file.suffix == ".tsv"))
        return
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    yield from row_chunks(file.name, [(1, {"text": text})] if text.strip() else [])


def _json_chunks(source: str, data: bytes) -> Iterator[Chunk]:
    """A list of objects; one object per line, as many .json files have them; objects one after another over several
    lines, a single one among them; or an object around a list of objects.
    """
    text = _decode(source, data)
    first, _, rest = text.strip().partition("\n")
    if first.startswith("{") and first.rstrip().endswith("}") and (rest or not holds_a_list(text)):
        return line_chunks(source, data.split(b"\n"))
    if first and first[0] not in "[{":
        raise DataError(f"{source}: expected a list of objects, or one object per line")
    return row_chunks(source, objects_in(source, text) if first else [])


def _decode(source: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        reason = f"not valid UTF-8 (byte 0x{data[error.start]:02x}); save it as UTF-8"
        raise DataError(f"{source}:{line}: {reason}") from error
