"""Conversations and documents -> the examples a trainer takes, with counts of all that was cut or left out."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import numpy

from gemma_ft.data.conversation import Item, Pair, PlainText
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.documents import COUNTS, Documents
from gemma_ft.data.pack.examples import Example, Examples, piece_tokens
from gemma_ft.data.pack.packing import best_fit_decreasing
from gemma_ft.data.pack.preferences import arrange_preferences
from gemma_ft.data.pack.stats import DataStats
from gemma_ft.data.pack.text_windows import windows
from gemma_ft.data.read.bad_rows import BadRows
from gemma_ft.errors import DataError
from gemma_ft.system.limits import IGNORE

__all__ = ["DataStats", "Example", "Examples", "Prepared", "arrange", "chosen_by_hash", "prepare",
           "refuse_without_ends", "split_document", "untrainable"]  # fmt: skip

TooLong = Literal["auto", "truncate_right", "truncate_left", "split", "drop", "error"]


@dataclass(frozen=True)
class Prepared:
    """What is trained on, or scored, and what became of the rows that it was made from. Examples that are streamed
    (data.streamed) have all that a trainer asks of `Examples`.
    """

    examples: Examples
    stats: DataStats


def prepare(
    items: Sequence[Item | Pair], encoder: ChatEncoder, *, max_seq_len: int, packing: bool, too_long: TooLong = "auto"
) -> Prepared:
    """As `arrange`, of items in memory. Raises: DataError, also for refused system turns."""
    bad = BadRows()
    for item in items:
        if why := encoder.refuses(item):
            bad.add(item.where, why)
    bad.raise_if_any()
    return arrange(Documents.of(items, encoder), encoder, max_seq_len=max_seq_len, packing=packing, too_long=too_long)


def arrange(
    documents: Documents,
    encoder: ChatEncoder,
    *,
    max_seq_len: int,
    packing: bool,
    too_long: TooLong = "auto",
    chosen: Any = None,
    refuse: bool = True,
    weighted: bool = False,
) -> Prepared:
    """Examples of at most `max_seq_len` tokens: one document each, or several when `packing`. `chosen`: numbers of the
    documents that are meant, a number as often as it is to be seen (None: all of them, once).

    `too_long` decides on longer documents: they are cut at the right or left, split into chunks that hold every token
    once, dropped, or refused; "auto" cuts conversations at the right and splits documents. A piece that does not begin
    its document has a BOS of its own; one with no trained token in it is dropped.

    `weighted`: examples tell the weights of their tokens although all may be 1.

    Raises: DataError when a long one is refused, and, to `refuse`, when nothing is left or no conversation trains its
    terminator.
    """
    assert max_seq_len >= 2, "a sequence holds BOS and one trained token at least"
    chosen = numpy.arange(len(documents)) if chosen is None else numpy.asarray(chosen, numpy.int64)
    count = {name: documents.column(name)[chosen] for name in COUNTS}
    empty = documents.items - len(documents)
    stats = DataStats(documents.rows, rows=len(chosen) + empty, max_seq_len=max_seq_len, dropped_empty=empty)
    stats.left_out_turns = int(count["left_out"].sum())
    stats.dropped_system = int(count["system"].sum()) if encoder.system_policy == "drop" else 0
    stats.untrained = int((count["trained"] == 0).sum())
    for (kind, what), number in documents.remarks(chosen).items():
        getattr(stats, kind)[what] = number
    if documents.rows != "answers":
        compared = arrange_preferences(
            documents, encoder, max_seq_len=max_seq_len, too_long=too_long, chosen=chosen, stats=stats
        )
        return _counted(compared, stats, encoder, refuse=refuse, chats=True)
    whole = (count["tokens"] <= max_seq_len) & (count["trained"] > 0)
    long = (count["tokens"] > max_seq_len) & (count["trained"] > 0)
    stats.trained_tokens = int(count["trained"][whole].sum())
    stats.terminators = int(count["terminators"][whole].sum())
    pieces = numpy.zeros((int(whole.sum()), 3), numpy.int64)
    pieces[:, 0], pieces[:, 2] = chosen[whole], count["tokens"][whole]
    if too_long == "error":
        _refuse_long(documents, chosen[long], count["tokens"][long], max_seq_len)
    cut = [
        _cut(documents, number, tokens, max_seq_len, _policy(too_long, chat), encoder, stats)
        for number, tokens, chat in zip(
            chosen[long].tolist(), count["tokens"][long].tolist(), count["chat"][long].tolist(), strict=True
        )
    ]
    pieces = numpy.concatenate([pieces, *(numpy.array(one, numpy.int64).reshape(-1, 3) for one in cut)])
    pieces = pieces[numpy.lexsort((pieces[:, 1], pieces[:, 0]))]
    lengths = piece_tokens(pieces).tolist()
    rows = best_fit_decreasing(lengths, max_seq_len) if packing else [[index] for index in range(len(pieces))]
    examples = Examples(documents, pieces, rows, encoder.control.bos, weighted=weighted)
    return _counted(examples, stats, encoder, refuse=refuse, chats=bool(count["chat"].any()))


def _counted(examples: Examples, stats: DataStats, encoder: ChatEncoder, *, refuse: bool, chats: bool) -> Prepared:
    """Examples with the counts of what is in them. Raises: DataError, to `refuse`, as `arrange`."""
    pieces = examples.pieces
    if refuse:
        if not len(pieces):
            raise DataError(untrainable(stats, stats.max_seq_len))
        refuse_without_ends(stats, encoder, chats=chats)
    weights = examples.documents.weights()[pieces[:, 0]]
    if len(pieces):
        stats.weights = float(weights.min()), float(weights.max())
    stats.documents, stats.packed_rows, stats.tokens = len(pieces), len(examples), int(piece_tokens(pieces).sum())
    return Prepared(examples, stats)


def _policy(too_long: TooLong, chat: int) -> str:
    return too_long if too_long != "auto" else "truncate_right" if chat else "split"


def _cut(
    documents: Documents, number: int, tokens: int, limit: int, policy: str, encoder: ChatEncoder, stats: DataStats
) -> list[tuple[int, int, int]]:
    """The pieces that are made of a document of more than `limit` tokens, and their counts."""
    if policy == "split":  # each with a BOS of its own, so they are cut from what follows the document's
        cuts = windows(tokens - 1, size=limit - 1, stride=limit - 1)
        found = [(number, 0 if cut.start == 0 else cut.start + 1, cut.end + 1) for cut in cuts]
    else:
        found = {
            "truncate_right": [(number, 0, limit)],
            "truncate_left": [(number, tokens - limit + 1, tokens)],
            "drop": [],
        }[policy]
        stats.too_long += policy == "drop"
    kept = []
    for piece in found:
        labels = documents.cut(*piece)[1]
        trained = int((labels != IGNORE).sum())
        if trained:
            kept.append(piece)
            stats.trained_tokens += trained
            stats.terminators += int((labels == encoder.control.end_of_turn).sum())
    stats.dropped += bool(found) and not kept
    stats.truncated += bool(kept) and policy != "split"
    return kept


def _refuse_long(documents: Documents, numbers: Any, tokens: Any, limit: int) -> None:
    bad = BadRows()
    for number, size in zip(numbers.tolist(), tokens.tolist(), strict=True):
        bad.add(documents.where(number), f"{size:,} tokens, more than data.max_seq_len {limit} (data.too_long: error)")
    bad.raise_if_any()


def untrainable(stats: DataStats, max_seq_len: int) -> str:
    """Why nothing of some rows is left to train on."""
    if not stats.rows:
        return "there is no row to train on"
    limit = f"data.max_seq_len {max_seq_len}"
    why = (
        (stats.dropped_empty, "are empty"),
        (stats.dropped, f"have their answer past {limit}"),
        (stats.untrained, "have the weight 0, or no answer that is to be trained"),
        (stats.too_long, f"are longer than {limit}"),
        (stats.overlapping, "are held-out rows"),
    )
    found = ", ".join(f"{count:,} {what}" for count, what in why if count)
    return f"none of the {stats.rows + stats.overlapping:,} rows can be trained on: {found}"


def refuse_without_ends(stats: DataStats, encoder: ChatEncoder, *, chats: bool) -> None:
    """Raises DataError for chats from which no end of an answer would be learnt."""
    if chats and not stats.terminators:
        raise DataError(
            f"no {encoder.format.end} would be trained: every answer is cut at data.max_seq_len {stats.max_seq_len}; "
            "raise it"
        )


def chosen_by_hash(documents: Documents, numbers: Any, fraction: float, seed: int) -> Any:
    """Which of some documents are held out: their numbers. Each one's side follows from its content and the seed alone,
    so that equal documents never stand on both sides, and added ones move no other; one at least is held out.

    Raises: DataError when fewer than two distinct documents are there to split.
    """
    contents = documents.contents()
    return numbers[_held_out([contents[number].hex() for number in numbers.tolist()], fraction, seed)]


def shares(weights: Sequence[float], counts: Sequence[int]) -> list[float]:
    """How often the documents of each source are seen so that sources are trained in proportion to their weights, as
    many as can be without seeing one twice.
    """
    assert all(counts), "a source without documents has no share"
    each = [weight / count for weight, count in zip(weights, counts, strict=True)]
    return [one / max(each) for one in each]


def times(numbers: Any, repeats: float, contents: Sequence[bytes], seed: int) -> Any:
    """The numbers of documents, each `repeats` times; of a fraction those whose content hash comes first."""
    whole, rest = int(repeats), repeats % 1
    chosen = numpy.repeat(numbers, whole)
    if not rest:
        return chosen
    order = sorted(numbers.tolist(), key=lambda number: (share_of(contents[number].hex(), seed), number))
    return numpy.sort(numpy.concatenate([chosen, order[: round(rest * len(order))]]).astype(numpy.int64))


def _held_out(contents: Sequence[str], fraction: float, seed: int) -> Any:
    """Whether each of some content hashes is held out: bool array. Raises: DataError when one side would be empty."""
    marks = [share_of(content, seed) for content in contents]
    limit = max(Fraction(fraction), min(marks, default=Fraction(0)))
    held_out = numpy.array([mark <= limit for mark in marks], bool)
    if held_out.all() or not held_out.any():
        raise DataError(f"data.eval_fraction: {len(marks)} rows cannot be split; give data.eval, or more rows")
    return held_out


def share_of(content: str, seed: int) -> Fraction:
    """A number in [0, 1) that depends on content and seed alone."""
    digest = hashlib.sha256(f"{seed}:{content}".encode()).digest()
    return Fraction(int.from_bytes(digest[:8], "big"), 2**64)


def split_document(document: PlainText, fraction: float) -> tuple[list[Item], list[Item]]:
    """A long document cut near its end, at a line break. Raises: DataError where it has none."""
    at = document.text.rfind("\n", 0, int(len(document.text) * (1 - fraction))) + 1
    head, tail = document.text[:at], document.text[at:]
    if not head.strip() or not tail.strip():
        raise DataError("data.eval_fraction: a single document without line breaks cannot be split; give data.eval")
    return [replace(document, text=head)], [replace(document, text=tail)]
