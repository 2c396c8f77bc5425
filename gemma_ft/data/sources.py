"""Files and hub data sets -> rows. Each row knows its place, so that every later complaint can name it.

Defined behaviour: UTF-8, with or without a byte order mark; CRLF and LF line ends; blank lines are skipped; what is
not UTF-8, or not one object per row, is refused with its line.
"""

import csv
import difflib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_ft.data.bad_rows import BadRows
from gemma_ft.data.chunks import Chunk, line_chunks, read_lines, row_chunks
from gemma_ft.data.hub import read_hub_records
from gemma_ft.data.json_rows import MAX_ROW_BYTES, objects_in
from gemma_ft.errors import DataError, first_line

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
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
    """All rows of a file (.jsonl, .json, .csv, .parquet, .txt as one row) or of a hub data set, in order.

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


def read_chunks(source: str, *, split: str = "train", revision: str | None = None) -> Iterator[Chunk]:
    """The rows of a source as `read_rows` gives them, a chunk at a time: lines of JSON, parquet and hub data sets need
    not fit into memory.

    Raises: DataError for what cannot be read; rows that hold no object are found by whoever opens the chunk.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if path.is_file():
        if suffix not in SUFFIXES:
            raise DataError(f"{source}: cannot tell the file type from {suffix or 'no suffix'!r}; use {_any(SUFFIXES)}")
        yield from _file_chunks(source, path, suffix)
    elif path.is_dir():
        raise DataError(f"{source}: is a folder; name one file in it ({_any(SUFFIXES)})")
    elif _is_hub_id(source, path):
        records = read_hub_records(source, split=split, revision=revision)
        yield from row_chunks(f"{source}[{split}]", enumerate(records, start=1), unit="row ")
    else:
        raise DataError(f"{source}: no such file{_did_you_mean(path)}")


def _any(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _is_hub_id(source: str, path: Path) -> bool:
    """Whether a name that is no path here can be meant as a hub id, rather than as a mistyped path."""
    mistyped = path.suffix.lower() in SUFFIXES or _similar_name(path) is not None
    in_a_folder = len(path.parts) > 1 and Path(path.parts[0]).is_dir()
    return bool(HUB_ID.fullmatch(source)) and not mistyped and not in_a_folder


def _similar_name(path: Path) -> str | None:
    try:
        names = sorted(entry.name for entry in path.parent.iterdir() if entry.suffix.lower() in SUFFIXES)
    except OSError:
        return None
    return next(iter(difflib.get_close_matches(path.name, names, n=1, cutoff=0.7)), None)


def _did_you_mean(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; there is no folder {str(path.parent)!r}"
    similar = _similar_name(path)
    return f"; did you mean {similar!r}?" if similar else ""


def _file_chunks(source: str, path: Path, suffix: str) -> Iterator[Chunk]:
    if suffix == ".parquet":
        yield from row_chunks(source, _parquet_rows(source), unit="row ")
        return
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror}") from error
    with file:
        head = file.read(len(UTF8_MARK))
        if head.startswith(UTF16_MARKS):
            raise DataError(f"{source}: is UTF-16; save it as UTF-8")
        file.seek(len(UTF8_MARK) if head == UTF8_MARK else 0)
        if suffix == ".jsonl":
            yield from line_chunks(source, read_lines(file))
            return
        data = file.read()
    if suffix == ".json":
        yield from _json_chunks(source, data)
        return
    text = _decode(source, data)
    if suffix == ".csv":
        yield from row_chunks(source, _csv_rows(source, text))
        return
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    yield from row_chunks(source, [(1, {"text": text})] if text.strip() else [])


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


def _csv_rows(source: str, text: str) -> list[tuple[int, dict[str, Any]]]:
    """(first line, fields) of comma-separated rows under a header line; quoted fields may hold line breaks."""
    rows: list[tuple[int, dict[str, Any]]] = []
    bad = BadRows()
    before = csv.field_size_limit(MAX_ROW_BYTES)  # a setting of the whole process: given back below
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header: list[str] = next(reader, [])
        if len(set(header)) < len(header) or not all(name.strip() for name in header):
            raise DataError(f"{source}:1: the header needs one distinct name for each column, got {', '.join(header)}")
        line = reader.line_num + 1
        for cells in reader:
            if len(cells) == len(header):
                rows.append((line, dict(zip(header, cells, strict=True))))
            elif cells:
                bad.add(f"{source}:{line}", f"has {len(cells)} cells, the header has {len(header)}")
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{source}:{reader.line_num}: not valid CSV: {error}") from error
    finally:
        csv.field_size_limit(before)
    bad.raise_if_any()
    return rows


def _parquet_rows(source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(source) as file:
            for batch in file.iter_batches(PARQUET_ROWS):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"{source}: cannot be read as parquet: {first_line(error)}") from error
