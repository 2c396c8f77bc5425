"""The sources of a recipe become the examples that are trained on, and the items that are held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from transformers import PreTrainedTokenizerBase

from gemma_ft import runtime
from gemma_ft.data.bad_rows import BadRows
from gemma_ft.data.cache import Cache, Reading, items_at
from gemma_ft.data.chat import ChatEncoder
from gemma_ft.data.chunks import Chunk
from gemma_ft.data.dataset import Prepared, arrange, chosen_by_hash, prepare, shares, split_by_hash, times
from gemma_ft.data.documents import Documents
from gemma_ft.data.formats import check_format, detect_format
from gemma_ft.data.items import Conversation, Item, content_hash
from gemma_ft.data.sources import Row, read_chunks, rows_of
from gemma_ft.errors import DataError
from gemma_ft.load import located
from gemma_ft.recipe.paths import names_of
from gemma_ft.recipe.schema import Data, Recipe, Source

Progress = Callable[[int], None]


@dataclass(frozen=True)
class BuiltData:
    """What a run reads: examples for training and for the held-out loss, and the held-out conversations as they
    were.
    """

    encoder: ChatEncoder
    train: Prepared
    held_out: Prepared | None
    held_out_items: Sequence[Item]
    train_source: str
    train_format: str  # the format of the training rows, and why; of several sources a line each
    eval_source: str | None
    overlap: int  # held-out rows that are training rows too
    skipped: Sequence[tuple[str, str]]  # (where, reason) of bad rows that were left out


def build_data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, progress: Progress = lambda documents: None
) -> BuiltData:
    """Read, check, encode and pack the recipe's rows; what was encoded before is taken from the cache. `progress` hears
    how many training documents have come.

    Raises: DataError naming what is wrong, rows by their place; DiskError when the cache cannot be written.
    """
    data = recipe.data
    encoder = ChatEncoder(tokenizer, data.system, data.trained_turns)
    skipped = BadRows()
    sources = [read_source(source, data, encoder, skipped, progress) for source in data.train]
    documents, chosen, held_out = _parted(recipe, sources, encoder, skipped)
    train = arrange(
        documents, encoder, max_seq_len=data.max_seq_len, packing=data.packing, too_long=data.too_long, chosen=chosen
    )
    least, most = train.stats.weights
    if least < most and recipe.train.global_batch_size == 1 and not data.packing:
        raise DataError(
            "data.columns.weight: weights are relative to those of the other rows of a step, and each step has one row "
            "(train.global_batch_size: 1); raise it, or take the weights out"
        )
    scored = _scored(recipe, held_out, encoder)
    contents = documents.contents() if held_out.items else []
    seen = {contents[number] for number in numpy.unique(chosen).tolist()} if held_out.items else set()
    overlap = sum(bytes.fromhex(content_hash(item)) in seen for item in held_out.items)
    if overlap and recipe.eval.overlap == "error":
        raise DataError(
            f"data.eval: {overlap:,} held-out rows of {len(held_out.items):,} are training rows too, and their scores "
            "would mean little; take them out of data.train, or set eval.overlap: allow"
        )
    return BuiltData(
        encoder=encoder,
        train=train,
        held_out=scored,
        held_out_items=held_out.items,
        train_source=names_of(data.train),
        train_format="\n".join(one.told(len(sources) > 1) for one in sources),
        eval_source=held_out.source,
        overlap=overlap,
        skipped=skipped.rows,
    )


def conversations(items: Sequence[Item]) -> list[Conversation]:
    """The conversations among items: those that can be answered by generation."""
    return [item for item in items if isinstance(item, Conversation)]


def chunks_of(source: Source) -> Iterator[Chunk]:
    """The rows of one source, unparsed. Raises: DataError when it cannot be read."""
    return read_chunks(located(source.path), split=source.split, revision=source.revision)


@dataclass(frozen=True)
class Described:
    """How the rows of a source are read, why, and the fields of its first row."""

    reading: Reading
    why: str
    fields: frozenset[str]


def described(source: Source, data: Data, encoder: ChatEncoder, train: Described | None = None) -> Described:
    """How a source is read. `train`: of the first training source, for one that is held out: `data.format` and
    `data.columns` describe data.train, and hold here where rows have the same fields; otherwise (training rows were
    replaced on the command line, say) the format is detected.

    Raises: DataError when the format cannot be told, or there is no row.
    """
    if train is None:
        check_format(*_named(source, data))
    rows = _first_rows(source)
    fields = frozenset(rows[0].fields)
    if train is not None and source.format is None and source.columns is None and fields != train.fields:
        source = source.model_copy(update={"format": "auto", "columns": {}})
    form, columns = _named(source, data)
    why = "named in the recipe"
    if form == "auto":
        form, why = detect_format(rows, columns)
    check_format(form, columns)
    return Described(Reading(form, columns, encoder), why, fields)


def _named(source: Source, data: Data) -> tuple[str, dict[str, str]]:
    """Format and columns as the recipe has them."""
    columns = data.columns if source.columns is None else source.columns
    return str(source.format or data.format), {str(key): template for key, template in columns.items()}


@dataclass(frozen=True)
class ReadSource:
    """One source of training rows, encoded."""

    source: Source
    described: Described
    documents: Documents

    @property
    def reading(self) -> Reading:
        """How its rows are read."""
        return self.described.reading

    def told(self, among_others: bool) -> str:
        """Its format and why; among others also its name, and how often its rows are seen."""
        if not among_others:
            return f"{self.reading.format}: {self.described.why}"
        return f"{self.source.path}: {self.count:,} documents, {self.reading.format}: {self.described.why}"

    @property
    def count(self) -> int:
        """Documents of it that are meant: all, or as many as max_rows."""
        return min(len(self.documents), self.source.max_rows or len(self.documents))


def read_source(
    source: Source, data: Data, encoder: ChatEncoder, skipped: BadRows, progress: Progress = lambda documents: None
) -> ReadSource:
    """The rows of a source, encoded. Bad ones are told, or left out and added to `skipped`, as the recipe says.

    Raises: DataError.
    """
    found = described(source, data, encoder)
    bad, more = BadRows(), {"limit": source.max_rows} if source.max_rows else {}
    cache = Cache(runtime.cache_folder(), runtime.processors())
    documents = cache.documents(chunks_of(source), found.reading, bad, progress=progress, **more)
    _settle(bad, documents.items + bad.count, data, skipped)
    return ReadSource(source, found, documents)


@dataclass(frozen=True)
class Held:
    """Held-out items, and where they came from."""

    source: str | None
    items: Sequence[Item]


def _parted(
    recipe: Recipe, sources: Sequence[ReadSource], encoder: ChatEncoder, skipped: BadRows
) -> tuple[Documents, Any, Held]:
    """The documents, which of them are trained on, each as often as its source says, and the held-out items."""
    data = recipe.data
    documents = Documents.joined([one.documents for one in sources])
    share = f"{data.eval_fraction:.1%} of {names_of(data.train)}"
    if data.eval is None and data.eval_fraction and documents.items == 1 and not documents.column("chat").any():
        (one,) = (one for one in sources if one.documents.items)
        (only,) = (item for chunk in chunks_of(one.source) for _, item in one.reading.items(chunk, BadRows()))
        train, tail = split_by_hash([only], data.eval_fraction, recipe.seed)
        documents = Documents.of(train, encoder)
        chosen = times(numpy.arange(1), one.source.repeats, documents.contents(), recipe.seed)
        return documents, chosen, Held(share, tail)
    starts = numpy.cumsum([0, *(len(one.documents) for one in sources)])
    numbers = [start + numpy.arange(one.count) for start, one in zip(starts, sources, strict=False)]
    held = Held(None, [])
    if data.eval is not None:
        items = [item for source in data.eval for item in _items(source, data, sources, skipped)]
        held = Held(names_of(data.eval), items)
    elif data.eval_fraction:
        out = chosen_by_hash(documents, numpy.concatenate(numbers), data.eval_fraction, recipe.seed)
        held = Held(share, _held_items(sources, starts, out))
        numbers = [numpy.setdiff1d(one, out) for one in numbers]
    repeats = [one.source.repeats for one in sources]
    if sources[0].source.weight is not None:
        empty = next((one for one, found in zip(sources, numbers, strict=True) if not len(found)), None)
        if empty is not None:
            raise DataError(f"{empty.source.path}: has a weight, and no document that is trained on; take it out")
        repeats = shares([one.source.weight or 1.0 for one in sources], [len(one) for one in numbers])
    contents = documents.contents() if any(repeat % 1 for repeat in repeats) else []
    chosen = [times(one, repeat, contents, recipe.seed) for one, repeat in zip(numbers, repeats, strict=True)]
    return documents, numpy.concatenate(chosen), held


def _held_items(sources: Sequence[ReadSource], starts: Any, out: Any) -> list[Item]:
    """The items of some documents, read again where they lie."""
    found: list[Item] = []
    for one, start, end in zip(sources, starts[:-1], starts[1:], strict=True):
        wanted = out[(out >= start) & (out < end)] - start
        found += items_at(chunks_of(one.source), one.reading, one.documents, wanted.tolist()) if len(wanted) else []
    return found


def _items(source: Source, data: Data, sources: Sequence[ReadSource], skipped: BadRows) -> list[Item]:
    """The rows of a held-out source as items."""
    bad = BadRows()
    reading = described(source, data, sources[0].reading.encoder, sources[0].described).reading
    items: list[Item] = []
    for chunk in chunks_of(source):
        items += [item for _, item in reading.items(chunk, bad)]
        if source.max_rows is not None and len(items) >= source.max_rows:
            break
    _settle(bad, len(items) + bad.count, data, skipped)
    return items[: source.max_rows]


def _scored(recipe: Recipe, held_out: Held, encoder: ChatEncoder) -> Prepared | None:
    """The held-out rows whose loss is scored."""
    data = recipe.data
    if not held_out.items:
        return None
    try:
        items = held_out.items[: recipe.eval.max_rows]
        return prepare(items, encoder, max_seq_len=data.max_seq_len, packing=data.packing, too_long=data.too_long)
    except DataError as error:
        raise DataError(f"held-out rows, {held_out.source}: {error}") from error


def _first_rows(source: Source) -> list[Row]:
    """The first rows of a source that are whole. Raises: DataError when it holds none."""
    bad = BadRows()
    for chunk in chunks_of(source):
        rows = rows_of(chunk, bad)
        if rows:
            return rows
    bad.raise_if_any()
    raise DataError(f"{located(source.path)}: holds no rows")


def _settle(bad: BadRows, rows: int, data: Data, skipped: BadRows) -> None:
    if data.on_bad_row == "error":
        bad.raise_if_any()
    bad.raise_if_many(rows)
    skipped.extend(bad)
