"""The sources of a recipe: how their rows are read, and what comes out of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gemma_ft.build.located import located_rows
from gemma_ft.data.conversation import Item, Pair
from gemma_ft.data.encode.cache import Cache
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.documents import Documents
from gemma_ft.data.encode.encode_rows import Reading
from gemma_ft.data.read.bad_rows import BadRows
from gemma_ft.data.read.chunks import Chunk
from gemma_ft.data.read.detect import check_format, detect_format
from gemma_ft.data.read.files import find_files
from gemma_ft.data.read.sources import Row, read_chunks, rows_of
from gemma_ft.errors import DataError
from gemma_ft.recipe.schema import Data, Source
from gemma_ft.system import environment, hardware
from gemma_ft.system.row_kind import DOCUMENTS_OF, RowKind

Progress = Callable[[int], None]


def chunks_of(source: Source, *, streaming: bool = False) -> Iterator[Chunk]:
    """The rows of one source, unparsed. Raises: DataError when it cannot be read."""
    return read_chunks(located_rows(source.path), split=source.split, revision=source.revision, streaming=streaming)


@dataclass(frozen=True)
class Described:
    """How the rows of a source are read, why (and of which split, where its files name any), and the fields of its
    first row.
    """

    source: Source
    reading: Reading
    why: str
    fields: frozenset[str]

    @property
    def told(self) -> str:
        """Its format, and why."""
        return f"{self.reading.format}: {self.why}"


def described(
    source: Source, data: Data, encoder: ChatEncoder, train: Described | None = None, *, rows: RowKind = "answers"
) -> Described:
    """How a source is read. `rows`: what the objective learns from.

    `train`: of the first training source, for one that is held out: `data.format` and
    `data.columns` describe data.train, and hold here where rows have the same fields; otherwise (training rows were
    replaced on the command line, say) the format is detected.

    Raises: DataError when the format cannot be told, or there is no row.
    """
    if train is None:
        check_format(*_named(source, data))
    first = _first_rows(source, streaming=data.streaming and train is None)
    fields = frozenset(first[0].fields)
    if train is not None and source.format is None and source.columns is None and fields != train.fields:
        source = source.model_copy(update={"format": "auto", "columns": {}})
    form, columns = _named(source, data)
    why = "named in the recipe"
    if form == "auto":
        form, why = detect_format(first, columns, rows)
    check_format(form, columns)
    files = find_files(located_rows(source.path), source.split)
    splits = f"; {files.told}" if files is not None and files.told else ""
    return Described(source, Reading(form, columns, encoder, rows), why + splits, fields)


def _named(source: Source, data: Data) -> tuple[str, dict[str, str]]:
    """Format and columns as the recipe has them."""
    columns = data.columns if source.columns is None else source.columns
    return str(source.format or data.format), {str(key): template for key, template in columns.items()}


@dataclass(frozen=True)
class ReadSource:
    """One source of training rows, encoded."""

    described: Described
    documents: Documents

    @property
    def source(self) -> Source:
        """As the recipe has it."""
        return self.described.source

    @property
    def reading(self) -> Reading:
        """How its rows are read."""
        return self.described.reading

    def told(self, among_others: bool) -> str:
        """Its format and why; among others also its name, and how often its rows are seen."""
        if not among_others:
            return self.described.told
        return f"{self.source.path}: {self.count:,} documents, {self.described.told}"

    @property
    def count(self) -> int:
        """min(its documents, max_rows); a pair of them is a row."""
        most = (self.source.max_rows or len(self.documents)) * DOCUMENTS_OF[self.reading.rows]
        return min(len(self.documents), most)


def read_source(
    source: Source,
    data: Data,
    encoder: ChatEncoder,
    skipped: BadRows,
    progress: Progress = lambda documents: None,
    *,
    rows: RowKind = "answers",
) -> ReadSource:
    """The rows of a source, encoded. Bad ones are told, or left out and added to `skipped`, as the recipe says.

    Raises: DataError.
    """
    found = described(source, data, encoder, rows=rows)
    each = DOCUMENTS_OF[rows]
    bad, more = BadRows(), {"limit": source.max_rows * each} if source.max_rows else {}
    cache = Cache(environment.cache_folder(), hardware.processors())
    documents = cache.documents(chunks_of(source), found.reading, bad, progress=progress, **more)
    _settle(bad, documents.items // each + bad.count, data, skipped)
    return ReadSource(found, documents)


def items_of(source: Source, data: Data, train: Described, skipped: BadRows) -> list[Item | Pair]:
    """The rows of a held-out source as items. `train`: how the first training source is read."""
    bad = BadRows()
    reading = described(source, data, train.reading.encoder, train, rows=train.reading.rows).reading
    items: list[Item | Pair] = []
    for chunk in chunks_of(source):
        items += [item for _, item in reading.items(chunk, bad)]
        if source.max_rows is not None and len(items) >= source.max_rows:
            break
    _settle(bad, len(items) + bad.count, data, skipped)
    return items[: source.max_rows]


def _first_rows(source: Source, *, streaming: bool) -> list[Row]:
    """The first rows of a source that are whole. Raises: DataError when it holds none."""
    bad = BadRows()
    for chunk in chunks_of(source, streaming=streaming):
        rows = rows_of(chunk, bad)
        if rows:
            return rows
    bad.raise_if_any()
    raise DataError(f"{located_rows(source.path)}: holds no rows")


def _settle(bad: BadRows, rows: int, data: Data, skipped: BadRows) -> None:
    if data.on_bad_row == "error":
        bad.raise_if_any()
    bad.raise_if_many(rows)
    skipped.extend(bad)
