"""Rows of tables: CSV, tab-separated text, parquet and Arrow files."""

import csv
import io
import re
from collections.abc import Iterator
from typing import Any

from gemma_ft.data.read.files import DataFile
from gemma_ft.data.read.json_rows import MAX_ROW_BYTES
from gemma_ft.errors import DataError, first_line

ROWS_AT_ONCE = 1024  # decoded from a table
MARKS = ",;\t|"  # between the cells of a CSV file
HEADER_CHARACTERS = 1 << 16
MARK_LINE = re.compile(r'\ufeff?"?sep=(.)"?[ \t]*(?:\r?\n|\r)')  # Excel's own
ARROW_FILE = b"ARROW1"  # what an Arrow file begins with; a stream does not


def csv_rows(source: str, text: str, *, tabs: bool = False) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(first line, fields, or why there are none) of the rows under a header line; quoted fields may hold line breaks.
    Cells are parted by tabs or commas, or by what the header has instead of them, as spreadsheets write it (";"), or
    what a line "sep=;" before it names.
    """
    before = csv.field_size_limit(MAX_ROW_BYTES)  # a setting of the whole process: given back below
    try:
        said = MARK_LINE.match(text)
        if said is not None:  # an empty line in its place, so that the others keep their numbers
            text = f"\n{text[said.end() :]}"
        mark = "\t" if tabs else said[1] if said else _mark(text.lstrip())
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
        yield from _under_header(source, rows)
    except csv.Error as error:
        kind = "tab-separated text" if tabs else "CSV"
        raise DataError(f"{source}:{rows.line_num}: not valid {kind}: {error}") from error
    finally:
        csv.field_size_limit(before)


def _mark(text: str) -> str:
    """What parts the cells of a header."""
    start = text[:HEADER_CHARACTERS]
    found = [mark for mark in MARKS if len(next(csv.reader(io.StringIO(start, newline=""), delimiter=mark), [])) > 1]
    return found[0] if "," in found or len(found) == 1 else ","


def _under_header(source: str, rows: Any) -> Iterator[tuple[int, dict[str, Any] | str]]:
    written: list[str] = next((row for row in rows if len(row) > 1 or "".join(row).strip()), [])
    header = [name if name.strip() else f"Unnamed: {at}" for at, name in enumerate(written)]
    if len(set(header)) < len(header) or (written and not "".join(written).strip()):
        named, line = ", ".join(written), rows.line_num or 1
        raise DataError(f"{source}:{line}: the header needs one distinct name for each column, got {named}")
    line = rows.line_num + 1
    for cells in rows:
        if len(cells) == len(header):
            yield line, dict(zip(header, cells, strict=True))
        elif cells:
            yield line, f"has {len(cells)} cells, the header has {len(header)}"
        line = rows.line_num + 1


def table_rows(file: DataFile, opened: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, fields) of the rows of a parquet or Arrow file. Raises: DataError."""
    import pyarrow

    batches, kind = (_parquet, "parquet") if file.suffix == ".parquet" else (_arrow, "Arrow")
    number = 0
    try:
        for batch in batches(io.BytesIO(opened.read()) if file.compression else opened):
            for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                for record in batch.slice(start, ROWS_AT_ONCE).to_pylist():
                    number += 1
                    yield number, record
    except (OSError, ValueError, OverflowError, KeyError, pyarrow.ArrowException) as error:
        raise DataError(f"{file.name}: cannot be read as {kind}: {first_line(error)}") from error


def _parquet(opened: Any) -> Iterator[Any]:
    """Batches of a parquet file, which is read from its end."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(opened) as table:
        yield from table.iter_batches(ROWS_AT_ONCE)


def _arrow(opened: Any) -> Iterator[Any]:
    """Batches of an Arrow stream, as `datasets` saves it, or of an Arrow file, which has its table of contents last."""
    import pyarrow.ipc

    head = opened.read(len(ARROW_FILE))
    opened.seek(0)
    if head == ARROW_FILE:
        with pyarrow.ipc.open_file(opened) as table:
            yield from map(table.get_batch, range(table.num_record_batches))
    else:
        with pyarrow.ipc.open_stream(opened) as table:
            yield from table
