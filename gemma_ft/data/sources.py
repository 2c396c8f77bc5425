"""Files and hub data sets -> rows. Each row knows its place, so that every later complaint can name it.

Defined behaviour: UTF-8, with or without a byte order mark; CRLF and LF line ends; blank lines are skipped; what is
not UTF-8, or not one object per row, is refused with its line.
"""

import csv
import difflib
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_ft.data.bad_rows import BadRows
from gemma_ft.data.hub import read_hub_records
from gemma_ft.data.items import kind_of
from gemma_ft.errors import DataError, first_line

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")
MAX_ROW_BYTES = 64 * 2**20
BLANKS = re.compile(r"[ \t\r\n]*")
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
    path = Path(source)
    suffix = path.suffix.lower()
    if path.is_file():
        if suffix not in SUFFIXES:
            raise DataError(f"{source}: cannot tell the file type from {suffix or 'no suffix'!r}; use {_any(SUFFIXES)}")
        rows = _read_file(source, path, suffix)
    elif path.is_dir():
        raise DataError(f"{source}: is a folder; name one file in it ({_any(SUFFIXES)})")
    elif _is_hub_id(source, path):
        records = read_hub_records(source, split=split, revision=revision)
        rows = [Row(f"{source}[{split}]:row {number}", record) for number, record in enumerate(records, start=1)]
    else:
        raise DataError(f"{source}: no such file{_did_you_mean(path)}")
    if not rows:
        raise DataError(f"{source}: holds no rows")
    return rows


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


def _read_file(source: str, path: Path, suffix: str) -> list[Row]:
    if suffix == ".parquet":
        return _read_parquet(source)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror}") from error
    if data.startswith(UTF16_MARKS):
        raise DataError(f"{source}: is UTF-16; save it as UTF-8")
    data = data.removeprefix(UTF8_MARK)
    if suffix == ".jsonl":
        return _json_lines(source, data)
    text = _decode(source, data)
    if suffix == ".json":
        return _json_file(source, text, data)
    if suffix == ".csv":
        return _csv_rows(source, text)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return [Row(f"{source}:1", {"text": text})] if text.strip() else []


def _decode(source: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        reason = f"not valid UTF-8 (byte 0x{data[error.start]:02x}); save it as UTF-8"
        raise DataError(f"{source}:{line}: {reason}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return fields


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} (column {error.colno})"
    return "nested too deeply" if isinstance(error, RecursionError) else first_line(error)


def _json_lines(source: str, data: bytes) -> list[Row]:
    """One object per line. Only LF (or CRLF) ends a line: JSON text may hold other separators, such as U+2028."""
    rows: list[Row] = []
    bad = BadRows()
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)
    for number, line in enumerate(data.split(b"\n"), start=1):
        where = f"{source}:{number}"
        if not line.strip():
            continue
        if len(line) > MAX_ROW_BYTES:
            bad.add(where, f"the row has {len(line):,} bytes, more than {MAX_ROW_BYTES:,}")
            continue
        try:
            value = decoder.decode(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            bad.add(where, f"not valid UTF-8 (byte 0x{line[error.start]:02x})")
        except (ValueError, RecursionError) as error:
            bad.add(where, _json_fault(error))
        else:
            if isinstance(value, dict):
                rows.append(Row(where, value))
            else:
                bad.add(where, f"expected an object, got {kind_of(value)}")
    bad.raise_if_any()
    return rows


def _json_file(source: str, text: str, data: bytes) -> list[Row]:
    """A list of objects; or, as many .json files are, one object per line."""
    first_line = text.lstrip().partition("\n")[0].rstrip()
    if first_line.startswith("{") and first_line.endswith("}"):
        return _json_lines(source, data)
    if not first_line:
        return []
    if not first_line.startswith("["):
        raise DataError(f"{source}: expected a list of objects, or one object per line")
    rows: list[Row] = []
    bad = BadRows()
    for line, value in _list_elements(source, text):
        if isinstance(value, dict):
            rows.append(Row(f"{source}:{line}", value))
        else:
            bad.add(f"{source}:{line}", f"expected an object, got {kind_of(value)}")
    bad.raise_if_any()
    return rows


def _list_elements(source: str, text: str) -> Iterator[tuple[int, Any]]:
    """(line where it begins, value) for each element of the JSON list `text`. Raises: DataError where it breaks."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)
    position = _after_blanks(text, _after_blanks(text, 0) + 1)
    line, counted = 1, 0
    done = text[position : position + 1] == "]"
    if done:
        position = _after_blanks(text, position + 1)
    while not done:
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{source}:{error.lineno}: {_json_fault(error)}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{source}:{line}: {_json_fault(error)}") from error
        yield line, value
        position = _after_blanks(text, position)
        mark = text[position : position + 1]
        if mark not in (",", "]") or not mark:
            at = text.count("\n", 0, position) + 1
            raise DataError(f"{source}:{at}: not valid JSON: expected ',' or ']' after an element")
        done = mark == "]"
        position = _after_blanks(text, position + 1)
    if position < len(text):
        at = text.count("\n", 0, position) + 1
        raise DataError(f"{source}:{at}: not valid JSON: text after the end of the list")


def _after_blanks(text: str, position: int) -> int:
    found = BLANKS.match(text, position)
    return found.end() if found else position


def _csv_rows(source: str, text: str) -> list[Row]:
    """Comma-separated rows under a header line; quoted fields may hold line breaks. `where` is a row's first line."""
    rows: list[Row] = []
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
                rows.append(Row(f"{source}:{line}", dict(zip(header, cells, strict=True))))
            elif cells:
                bad.add(f"{source}:{line}", f"has {len(cells)} cells, the header has {len(header)}")
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{source}:{reader.line_num}: not valid CSV: {error}") from error
    finally:
        csv.field_size_limit(before)
    bad.raise_if_any()
    return rows


def _read_parquet(source: str) -> list[Row]:
    import pyarrow.parquet

    try:
        records = pyarrow.parquet.read_table(source).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"{source}: cannot be read as parquet: {first_line(error)}") from error
    return [Row(f"{source}:row {number}", record) for number, record in enumerate(records, start=1)]
