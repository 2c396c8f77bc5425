"""Files and hub data sets -> rows. Each row knows its place, so that every later complaint can name it.

Defined behaviour: UTF-8, with or without a byte order mark; CRLF and LF line ends; blank lines are skipped; what is
not UTF-8, or not one object per row, is refused with its line.
"""

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from gemma_ft.data.bad_rows import BadRows
from gemma_ft.data.chunks import Chunk, line_chunks, read_lines, row_chunks
from gemma_ft.data.files import DataFile, did_you_mean, files_at, looks_mistyped
from gemma_ft.data.hub import read_hub_records
from gemma_ft.data.json_rows import MAX_ROW_BYTES, objects_in
from gemma_ft.errors import DataError, first_line

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")
PARQUET_ROWS = 1024  # decoded at a time
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
UTF8_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """One row as it was read: `where` is "path:line" ("path:row N" where a source has no lines)."""

    where: str
    fields: dict[str, Any]


def read_rows(source: str, *, split: str = "train", revision: str | None = None) -> list[Row]:
    """All rows of a source, in order: of a file (.jsonl, .json, .csv, .parquet, .txt as one row; .gz and .zst of them),
    of all files in a folder or that fit a pattern, on this machine or behind a URL such as s3://, or of a hub data set.

    A hub data set is "owner/name", or "owner/name:config" where it has several; `split` and `revision` are its own.

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
    files = files_at(source)
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
        if file.suffix == ".parquet":
            yield from row_chunks(file.name, _parquet_rows(file, opened), unit="row ")
            return
        lines = io.BufferedReader(cast(Any, opened)) if not hasattr(opened, "peek") else opened
        head = lines.peek(len(UTF8_MARK))[: len(UTF8_MARK)]
        if head.startswith(UTF16_MARKS):
            raise DataError(f"{file.name}: is UTF-16; save it as UTF-8")
        if head == UTF8_MARK:
            lines.read(len(UTF8_MARK))
        if file.suffix == ".jsonl":
            yield from line_chunks(file.name, read_lines(lines))
            return
        data = lines.read()
    if file.suffix == ".json":
        yield from _json_chunks(file.name, data)
        return
    text = _decode(file.name, data)
    if file.suffix == ".csv":
        yield from row_chunks(file.name, _csv_rows(file.name, text))
        return
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    yield from row_chunks(file.name, [(1, {"text": text})] if text.strip() else [])


def _json_chunks(source: str, data: bytes) -> Iterator[Chunk]:
    """A list of objects; or, as many .json files are, one object per line."""
    text = _decode(source, data)
    first_line = text.lstrip().partition("\n")[0].rstrip()
    if first_line.startswith("{") and first_line.endswith("}"):
        return line_chunks(source, data.split(b"\n"))
    if first_line and not first_line.startswith("["):
        raise DataError(f"{source}: expected a list of objects, or one object per line")
    return row_chunks(source, objects_in(source, text) if first_line else [])


def _decode(source: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        reason = f"not valid UTF-8 (byte 0x{data[error.start]:02x}); save it as UTF-8"
        raise DataError(f"{source}:{line}: {reason}") from error


def _csv_rows(source: str, text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(first line, fields, or why there are none) of comma-separated rows under a header line; quoted fields may hold
    line breaks.
    """
    before = csv.field_size_limit(MAX_ROW_BYTES)  # a setting of the whole process: given back below
    try:
        rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        yield from _under_header(source, rows)
    except csv.Error as error:
        raise DataError(f"{source}:{rows.line_num}: not valid CSV: {error}") from error
    finally:
        csv.field_size_limit(before)


def _under_header(source: str, rows: Any) -> Iterator[tuple[int, dict[str, Any] | str]]:
    header: list[str] = next((row for row in rows if len(row) > 1 or "".join(row).strip()), [])
    if len(set(header)) < len(header) or not all(name.strip() for name in header):
        named, line = ", ".join(header), rows.line_num or 1
        raise DataError(f"{source}:{line}: the header needs one distinct name for each column, got {named}")
    line = rows.line_num + 1
    for cells in rows:
        if len(cells) == len(header):
            yield line, dict(zip(header, cells, strict=True))
        elif cells:
            yield line, f"has {len(cells)} cells, the header has {len(header)}"
        line = rows.line_num + 1


def _parquet_rows(file: DataFile, opened: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow.parquet

    number = 0
    whole = opened if not file.compression else io.BytesIO(opened.read())  # parquet is read from its end
    try:
        with pyarrow.parquet.ParquetFile(whole) as table:
            for batch in table.iter_batches(PARQUET_ROWS):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (OSError, ValueError, OverflowError, KeyError, pyarrow.ArrowException) as error:
        raise DataError(f"{file.name}: cannot be read as parquet: {first_line(error)}") from error
