"""Conversations and documents -> the examples a trainer takes, with counts of all that was cut or left out."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

import numpy

from gemma_ft.data.bad_rows import BadRows
from gemma_ft.data.chat import IGNORE, ChatEncoder
from gemma_ft.data.documents import COUNTS, Documents
from gemma_ft.data.examples import Example, Examples, piece_tokens
from gemma_ft.data.items import Document, Item, content_hash
from gemma_ft.data.packing import best_fit_decreasing
from gemma_ft.data.template import END_OF_TURN
from gemma_ft.data.windows import windows
from gemma_ft.errors import DataError

__all__ = ["DataStats", "Example", "Examples", "Prepared", "arrange", "chosen_by_hash", "prepare",
           "split_by_hash", "split_document"]  # fmt: skip


@dataclass
class DataStats:
    """What became of the rows. `describe` says it in a few lines."""

    rows: int = 0  # conversations and documents that came in
    documents: int = 0  # sequences that are trained on: conversations, and chunks of long documents
    packed_rows: int = 0  # examples
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0  # conversations cut at max_seq_len and still trained on
    dropped: int = 0  # conversations whose answers lie wholly past max_seq_len
    dropped_empty: int = 0  # an answer, a question or a whole document is empty
    left_out_turns: int = 0  # leading answers and trailing questions of sharegpt
    dropped_system: int = 0  # system turns left out by the policy "drop"
    terminators: int = 0  # trained <end_of_turn> tokens
    max_seq_len: int = 0

    @property
    def fill(self) -> float:
        """Share of the token budget that holds tokens, 0 to 1."""
        return self.tokens / max(self.packed_rows * self.max_seq_len, 1)

    def describe(self) -> str:
        """A few lines for a person: totals first, then only what needs attention."""
        share = self.trained_tokens / max(self.tokens, 1)
        lines = [
            f"{self.rows:,} rows -> {self.documents:,} sequences, {self.tokens:,} tokens, {share:.0%} trained",
            f"{self.packed_rows:,} examples of up to {self.max_seq_len:,} tokens, {self.fill:.1%} full",
        ]
        notes = (
            (self.truncated, "cut at max_seq_len"),
            (self.dropped, "dropped: their answer lies past max_seq_len"),
            (self.dropped_empty, "dropped: empty question, answer or text"),
            (self.left_out_turns, "turns left out: answers before the first question, questions after the last answer"),
            (self.dropped_system, "system turns left out (data.system: drop)"),
        )
        return "\n".join(lines + [f"{count:,} {what}" for count, what in notes if count])

    def as_dict(self) -> dict[str, int]:
        """The counts by name, for a report file."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


@dataclass(frozen=True)
class Prepared:
    """What is trained on, or scored, and what became of the rows that it was made from."""

    examples: Examples
    stats: DataStats


def prepare(items: Sequence[Item], encoder: ChatEncoder, *, max_seq_len: int, packing: bool) -> Prepared:
    """As `arrange`, of items in memory. Raises: DataError, also for refused system turns."""
    bad = BadRows()
    for item in items:
        if why := encoder.refuses(item):
            bad.add(item.where, why)
    bad.raise_if_any()
    return arrange(Documents.of(items, encoder), encoder, max_seq_len=max_seq_len, packing=packing)


def arrange(
    documents: Documents,
    encoder: ChatEncoder,
    *,
    max_seq_len: int,
    packing: bool,
    chosen: Any = None,
    empty: int | None = None,
) -> Prepared:
    """Examples of at most `max_seq_len` tokens: one document each, or several when `packing`. `chosen`: numbers of the
    documents that are meant (None: all); `empty`: how many items without content to count to them (None: all).

    Conversations are cut at the right; one with no trained token left is dropped. Long documents are cut into chunks,
    each with its own BOS, and nothing is lost.

    Raises: DataError when nothing is left, or no conversation trains its terminator.
    """
    assert max_seq_len >= 2, "a sequence holds BOS and one trained token at least"
    chosen = numpy.arange(len(documents)) if chosen is None else numpy.asarray(chosen, numpy.int64)
    count = {name: documents.column(name)[chosen] for name in COUNTS}
    empty = documents.items - len(documents) if empty is None else empty
    stats = DataStats(rows=len(chosen) + empty, max_seq_len=max_seq_len, dropped_empty=empty)
    stats.left_out_turns = int(count["left_out"].sum())
    stats.dropped_system = int(count["system"].sum()) if encoder.system_policy == "drop" else 0
    whole = count["tokens"] <= max_seq_len
    chats = count["chat"] > 0
    stats.trained_tokens = int(count["trained"][whole].sum())
    stats.terminators = int(count["terminators"][whole].sum())
    pieces = numpy.zeros((int(whole.sum()), 3), numpy.int64)
    pieces[:, 0], pieces[:, 2] = chosen[whole], count["tokens"][whole]
    cut = [_cut_chat(documents, int(one), max_seq_len, encoder, stats) for one in chosen[~whole & chats]]
    cut += [_chunks(documents, int(one), max_seq_len, stats) for one in chosen[~whole & ~chats]]
    pieces = numpy.concatenate([pieces, *(numpy.array(one, numpy.int64).reshape(-1, 3) for one in cut)])
    pieces = pieces[numpy.lexsort((pieces[:, 1], pieces[:, 0]))]
    _refuse_untrainable(stats, int(chats.sum()), len(pieces))
    lengths = piece_tokens(pieces).tolist()
    rows = best_fit_decreasing(lengths, max_seq_len) if packing else [[index] for index in range(len(pieces))]
    stats.documents, stats.packed_rows, stats.tokens = len(pieces), len(rows), sum(lengths)
    return Prepared(Examples(documents, pieces, rows, encoder.control.bos), stats)


def _refuse_untrainable(stats: DataStats, chats: int, left: int) -> None:
    """Raises DataError for data from which nothing, or no end of an answer, would be learnt."""
    limit = f"data.max_seq_len {stats.max_seq_len}"
    if not left:
        raise DataError(
            f"none of the {stats.rows} rows can be trained on: {stats.dropped_empty} are empty, "
            f"{stats.dropped} have their answer past {limit}"
        )
    if chats and not stats.terminators:
        raise DataError(f"no {END_OF_TURN} would be trained: every answer is cut at {limit}; raise it")


def _cut_chat(
    documents: Documents, document: int, limit: int, encoder: ChatEncoder, stats: DataStats
) -> list[tuple[int, int, int]]:
    """A conversation cut to the limit; nothing when no trained token is left in it."""
    labels = documents.cut(document, 0, limit)[1]
    trained = int((labels != IGNORE).sum())
    if not trained:
        stats.dropped += 1
        return []
    stats.truncated += 1
    stats.trained_tokens += trained
    stats.terminators += int((labels == encoder.control.end_of_turn).sum())
    return [(document, 0, limit)]


def _chunks(documents: Documents, document: int, limit: int, stats: DataStats) -> list[tuple[int, int, int]]:
    """A document in pieces of at most `limit` tokens, each beginning with BOS; together they hold every token once."""
    body = len(documents.cut(document, 1, sys.maxsize)[0])
    stats.trained_tokens += body
    cuts = windows(body, size=limit - 1, stride=limit - 1)
    return [(document, 0 if cut.start == 0 else cut.start + 1, cut.end + 1) for cut in cuts]


def chosen_by_hash(documents: Documents, fraction: float, seed: int) -> tuple[Any, Any]:
    """(train, eval): numbers of documents, as `split_by_hash` parts items. Raises: DataError."""
    held_out = _held_out([content.hex() for content in documents.contents()], fraction, seed)
    return numpy.flatnonzero(~held_out), numpy.flatnonzero(held_out)


def split_by_hash(items: Sequence[Item], fraction: float, seed: int) -> tuple[list[Item], list[Item]]:
    """(train, eval): each item's side follows from its content and the seed alone.

    So equal rows never stand on both sides, and added rows move no other.

    A single long document is cut near its end, at a line break. At least one row is held out, when fraction > 0.

    Raises: DataError when fewer than two distinct rows are there to split.
    """
    if not fraction:
        return list(items), []
    if len(items) == 1 and isinstance(items[0], Document):
        return split_document(items[0], fraction)
    held_out = _held_out([content_hash(item) for item in items], fraction, seed)
    train = [item for item, out in zip(items, held_out, strict=True) if not out]
    return train, [item for item, out in zip(items, held_out, strict=True) if out]


def _held_out(contents: Sequence[str], fraction: float, seed: int) -> Any:
    """Whether each of some content hashes is held out: bool array. Raises: DataError when one side would be empty."""
    marks = [_share(content, seed) for content in contents]
    limit = max(Fraction(fraction), min(marks, default=Fraction(0)))
    held_out = numpy.array([mark <= limit for mark in marks], bool)
    if held_out.all() or not held_out.any():
        raise DataError(f"data.eval_fraction: {len(marks)} rows cannot be split; give data.eval, or more rows")
    return held_out


def _share(content: str, seed: int) -> Fraction:
    """A number in [0, 1) that depends on content and seed alone."""
    digest = hashlib.sha256(f"{seed}:{content}".encode()).digest()
    return Fraction(int.from_bytes(digest[:8], "big"), 2**64)


def split_document(document: Document, fraction: float) -> tuple[list[Item], list[Item]]:
    """A long document cut near its end, at a line break. Raises: DataError where it has none."""
    at = document.text.rfind("\n", 0, int(len(document.text) * (1 - fraction))) + 1
    head, tail = document.text[:at], document.text[at:]
    if not head.strip() or not tail.strip():
        raise DataError("data.eval_fraction: a single document without line breaks cannot be split; give data.eval")
    return [Document(document.where, head)], [Document(document.where, tail)]
