"""The sources of a recipe become the examples that are trained on, and the items that are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy

from gemma_ft.build.sources import Described, Progress, ReadSource, chunks_of, described, items_of, read_source
from gemma_ft.build.stream import streamed_examples
from gemma_ft.data.conversation import Conversation, Item, Pair, PlainText
from gemma_ft.data.encode.cache import items_at
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.documents import Documents
from gemma_ft.data.pack.arrange import (
    DataStats,
    Prepared,
    arrange,
    chosen_by_hash,
    prepare,
    shares,
    split_document,
    times,
)
from gemma_ft.data.pack.examples import Examples
from gemma_ft.data.pack.streamed import StreamedExamples
from gemma_ft.data.read.bad_rows import BadRows
from gemma_ft.errors import DataError
from gemma_ft.recipe.load import names_of
from gemma_ft.recipe.schema import Data, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class BuiltData:
    """What a run reads: examples for training and for the held-out loss, and the held-out conversations as they
    were.
    """

    encoder: ChatEncoder
    train: Prepared  # of what is streamed the first block
    held_out: Prepared | None
    held_out_items: Sequence[Item | Pair]
    train_source: str
    train_format: str  # the format of the training rows, and why; of several sources a line each
    eval_source: str | None
    overlap: int  # held-out rows that are training rows too
    skipped: Sequence[tuple[str, str]]  # (where, reason) of bad rows that were left out
    streamed: StreamedExamples | None = None

    @property
    def examples(self) -> Examples | StreamedExamples:
        """What is trained on."""
        return self.train.examples if self.streamed is None else self.streamed

    @property
    def stats(self) -> DataStats:
        """What became of the training rows that were read so far."""
        return self.train.stats if self.streamed is None else self.streamed.stats


def build_data(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress = lambda documents: None,
    *,
    encoder: ChatEncoder | None = None,
) -> BuiltData:
    """Read, check, encode and pack the recipe's rows; what was encoded before is taken from the cache. `progress` hears
    how many training documents have come. encoder: another than the recipe's.

    Raises: DataError naming what is wrong, rows by their place; DiskError when the cache cannot be written.
    """
    data = recipe.data
    encoder = encoder or ChatEncoder(tokenizer, data.system, data.trained_turns)
    skipped = BadRows()
    if data.streaming:
        return _streamed(recipe, encoder, skipped)
    sources = [
        read_source(source, data, encoder, skipped, progress, rows=recipe.objective.rows) for source in data.train
    ]
    documents, chosen, held_out = _parted(recipe, sources, encoder, skipped)
    train = arrange(
        documents, encoder, max_seq_len=data.max_seq_len, packing=data.packing, too_long=data.too_long, chosen=chosen
    )
    _refuse_idle_weights(recipe, train)
    scored = _scored(recipe, held_out, encoder)
    contents = documents.contents() if held_out.items else []
    seen = {contents[number] for number in numpy.unique(chosen).tolist()} if held_out.items else set()
    overlap = sum(encoder.content_hash(item) in seen for item in held_out.items)
    if overlap and recipe.eval.overlap == "error":
        what = "are training rows too" if documents.rows == "answers" else "have the prompts of training rows"
        raise DataError(
            f"data.eval: {overlap:,} held-out rows of {len(held_out.items):,} {what}, and their scores "
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


def _streamed(recipe: Recipe, encoder: ChatEncoder, skipped: BadRows) -> BuiltData:
    """As `build_data`, of rows that are read while they are trained on."""
    data = recipe.data
    how = [described(source, data, encoder, rows=recipe.objective.rows) for source in data.train]
    held_out = _given(data, how[0], skipped)
    examples = streamed_examples(recipe, how, held_out.items)
    skipped.extend(examples.first.bad)
    train = examples.first.prepared
    _refuse_idle_weights(recipe, train)
    several = len(how) > 1
    told = [f"{one.source.path}: " * several + one.told for one in how]
    return BuiltData(
        encoder=encoder,
        train=train,
        held_out=_scored(recipe, held_out, encoder),
        held_out_items=held_out.items,
        train_source=f"{names_of(data.train)}, streamed; its first block",
        train_format="\n".join(told),
        eval_source=held_out.source,
        overlap=0,
        skipped=skipped.rows,
        streamed=examples,
    )


def _refuse_idle_weights(recipe: Recipe, train: Prepared) -> None:
    """Raises: DataError where weights would have no effect."""
    least, most = train.stats.weights
    if least < most and recipe.train.global_batch_size == 1 and not recipe.data.packing:
        raise DataError(
            "data.columns.weight: weights are relative to those of the other rows of a step, and each step has one row "
            "(train.global_batch_size: 1); raise it, or take the weights out"
        )


def conversations(items: Sequence[Item | Pair]) -> list[Conversation]:
    """The conversations among items: those that can be answered by generation."""
    return [item for item in good_answers(items) if isinstance(item, Conversation)]


def good_answers(items: Sequence[Item | Pair]) -> list[Item]:
    """Items to be answered or scored as they are: of a pair its chosen half, and none that is called a bad one."""
    whole = [item.halves[0] if isinstance(item, Pair) else item for item in items]
    return [item for item in whole if not (isinstance(item, Conversation) and item.label is False)]


@dataclass(frozen=True)
class HeldOut:
    """Held-out items, and where they came from."""

    source: str | None
    items: Sequence[Item | Pair]


def _given(data: Data, train: Described, skipped: BadRows) -> HeldOut:
    """The rows of `data.eval`; none where it is not set. `train`: how the first training source is read."""
    items = [item for source in data.eval or () for item in items_of(source, data, train, skipped)]
    return HeldOut(names_of(data.eval) if data.eval is not None else None, items)


def _parted(
    recipe: Recipe, sources: Sequence[ReadSource], encoder: ChatEncoder, skipped: BadRows
) -> tuple[Documents, Any, HeldOut]:
    """The documents, which of them are trained on, each as often as its source says, and the held-out items."""
    data = recipe.data
    documents = Documents.joined([one.documents for one in sources])
    share = f"{data.eval_fraction:.1%} of {names_of(data.train)}"
    if data.eval is None and data.eval_fraction and documents.items == 1 and not documents.column("chat").any():
        (one,) = (one for one in sources if one.documents.items)
        (only,) = (item for chunk in chunks_of(one.source) for _, item in one.reading.items(chunk, BadRows()))
        assert isinstance(only, PlainText), "it is no chat"
        train, tail = split_document(only, data.eval_fraction)
        documents = Documents.of(train, encoder)
        chosen = times(numpy.arange(1), one.source.repeats, documents.contents(), recipe.seed)
        return documents, chosen, HeldOut(share, tail)
    starts = numpy.cumsum([0, *(len(one.documents) for one in sources)])
    numbers = [start + numpy.arange(one.count) for start, one in zip(starts, sources, strict=False)]
    held = _given(data, sources[0].described, skipped)
    if data.eval is None and data.eval_fraction:
        out = chosen_by_hash(documents, numpy.concatenate(numbers), data.eval_fraction, recipe.seed)
        held = HeldOut(share, _held_items(sources, starts, out))
        numbers = [numpy.setdiff1d(one, out) for one in numbers]
    if documents.rows == "pairs":  # a pair is meant by its first document
        numbers = [one[one % 2 == 0] for one in numbers]
    repeats = [one.source.repeats for one in sources]
    if sources[0].source.weight is not None:
        empty = next((one for one, found in zip(sources, numbers, strict=True) if not len(found)), None)
        if empty is not None:
            raise DataError(f"{empty.source.path}: has a weight, and no document that is trained on; take it out")
        repeats = shares([one.source.weight or 1.0 for one in sources], [len(one) for one in numbers])
    contents = documents.contents() if any(repeat % 1 for repeat in repeats) else []
    chosen = [times(one, repeat, contents, recipe.seed) for one, repeat in zip(numbers, repeats, strict=True)]
    for one, found, meant in zip(sources, numbers, chosen, strict=True):
        if len(found) and not len(meant):
            raise DataError(
                f"{one.source.path}: of {len(found):,} documents repeats {one.source.repeats:g} leaves none; raise it, "
                "or take the source out"
            )
    return documents, numpy.concatenate(chosen), held


def _held_items(sources: Sequence[ReadSource], starts: Any, out: Any) -> list[Item | Pair]:
    """The items of some documents, read again where they lie."""
    found: list[Item | Pair] = []
    for one, start, end in zip(sources, starts[:-1], starts[1:], strict=True):
        wanted = out[(out >= start) & (out < end)] - start
        found += items_at(chunks_of(one.source), one.reading, one.documents, wanted.tolist()) if len(wanted) else []
    return found


def _scored(recipe: Recipe, held_out: HeldOut, encoder: ChatEncoder) -> Prepared | None:
    """The held-out rows whose loss is scored, each token once."""
    data = recipe.data
    if not held_out.items:
        return None
    try:
        items = [replace(item, weight=1.0) for item in held_out.items[: recipe.eval.max_rows]]
        return prepare(items, encoder, max_seq_len=data.max_seq_len, packing=data.packing, too_long=data.too_long)
    except DataError as error:
        raise DataError(f"held-out rows, {held_out.source}: {error}") from error
