"""Conversations and documents -> the examples a trainer takes, with counts of all that was cut or left out."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction

from gemma_ft.data.bad_rows import BadRows
from gemma_ft.data.chat import IGNORE, ChatEncoder, Encoded
from gemma_ft.data.items import Conversation, Document
from gemma_ft.data.packing import best_fit_decreasing
from gemma_ft.data.template import END_OF_TURN
from gemma_ft.data.windows import windows
from gemma_ft.errors import DataError

Item = Conversation | Document
Example = dict[str, list[int]]


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
    """Examples (input_ids, labels, position_ids, document_ids: lists of equal length), and where each one's documents
    stand in the source."""

    examples: list[Example]
    stats: DataStats
    wheres: list[list[str]] = field(default_factory=list)


def prepare(items: Sequence[Item], encoder: ChatEncoder, *, max_seq_len: int, packing: bool) -> Prepared:
    """Examples of at most `max_seq_len` tokens: one document each, or several when `packing`.

    Conversations are cut at the right; one with no trained token left is dropped. Long documents are cut into chunks,
    each with its own BOS, and nothing is lost. Each document's positions start at 0, and its first label is masked.

    Raises: DataError when nothing is left, when no conversation trains its terminator, or for a refused system turn.
    """
    assert max_seq_len >= 2, "a sequence holds BOS and one trained token at least"
    stats = DataStats(rows=len(items), max_seq_len=max_seq_len)
    chats, documents = _without_empty(items, stats)
    if encoder.system_policy == "error":
        _refuse_system(chats)
    if encoder.system_policy == "drop":
        stats.dropped_system = sum(chat.turns[0].role == "system" for chat in chats)
    encoded = [cut for chat in encoder.encode_many(chats) for cut in _truncated(chat, max_seq_len, stats)]
    end_of_turn = encoder.control.end_of_turn
    stats.terminators = sum(one.labels.count(end_of_turn) for one in encoded)
    _refuse_untrainable(len(items), len(chats), len(encoded) + len(documents), stats)
    encoded += [part for one in encoder.encode_documents(documents) for part in _chunks(one, max_seq_len)]
    lengths = [len(one.input_ids) for one in encoded]
    rows = best_fit_decreasing(lengths, max_seq_len) if packing else [[index] for index in range(len(encoded))]
    stats.documents, stats.packed_rows, stats.tokens = len(encoded), len(rows), sum(lengths)
    stats.trained_tokens = sum(label != IGNORE for one in encoded for label in one.labels)
    examples = [_example([encoded[index] for index in row]) for row in rows]
    return Prepared(examples, stats, [[encoded[index].where for index in row] for row in rows])


def _without_empty(items: Sequence[Item], stats: DataStats) -> tuple[list[Conversation], list[Document]]:
    """The conversations and the documents that have something to say; the others are counted."""
    chats: list[Conversation] = []
    documents: list[Document] = []
    for item in items:
        if isinstance(item, Document):
            documents += [item] if item.text.strip() else []
        elif all(turn.content.strip() for turn in item.turns if turn.role != "system"):
            chats.append(item)
            stats.left_out_turns += item.left_out
    stats.dropped_empty = len(items) - len(chats) - len(documents)
    return chats, documents


def _refuse_system(chats: Sequence[Conversation]) -> None:
    bad = BadRows()
    for chat in chats:
        if chat.turns[0].role == "system":
            bad.add(chat.where, "a system turn, and data.system is 'error'; set it to fold or drop")
    bad.raise_if_any()


def _refuse_untrainable(rows: int, chats: int, left: int, stats: DataStats) -> None:
    """Raises DataError for data from which nothing, or no end of an answer, would be learnt."""
    limit = f"data.max_seq_len {stats.max_seq_len}"
    if not left:
        raise DataError(
            f"none of the {rows} rows can be trained on: {stats.dropped_empty} are empty, "
            f"{stats.dropped} have their answer past {limit}"
        )
    if chats and not stats.terminators:
        raise DataError(f"no {END_OF_TURN} would be trained: every answer is cut at {limit}; raise it")


def _truncated(one: Encoded, limit: int, stats: DataStats) -> list[Encoded]:
    """The sequence cut to the limit; nothing when no trained token is left in it."""
    cut = Encoded(one.input_ids[:limit], one.labels[:limit], one.where)
    if all(label == IGNORE for label in cut.labels):
        stats.dropped += 1
        return []
    stats.truncated += len(one.input_ids) > limit
    return [cut]


def _chunks(one: Encoded, limit: int) -> list[Encoded]:
    """A document in pieces of at most `limit` tokens, each beginning with BOS; together they hold every token once."""
    bos, body = one.input_ids[0], one.input_ids[1:]
    cuts = windows(len(body), size=limit - 1, stride=limit - 1)
    parts = [body[cut.start : cut.end] for cut in cuts]
    return [Encoded([bos, *part], [IGNORE, *part], one.where) for part in parts]


def _example(documents: Sequence[Encoded]) -> Example:
    example: Example = {"input_ids": [], "labels": [], "position_ids": [], "document_ids": []}
    for number, one in enumerate(documents):
        assert one.labels[0] == IGNORE, "a document's first token is never predicted from the document before"
        example["input_ids"] += one.input_ids
        example["labels"] += one.labels
        example["position_ids"] += range(len(one.input_ids))
        example["document_ids"] += [number] * len(one.input_ids)
    return example


def content_hash(item: Item) -> str:
    """SHA-256 (hex) of what an item says, whatever its place."""
    said = [[turn.role, turn.content] for turn in item.turns] if isinstance(item, Conversation) else item.text
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def split_by_hash(items: Sequence[Item], fraction: float, seed: int) -> tuple[list[Item], list[Item]]:
    """(train, eval): each item's side follows from its content and the seed alone.

    So equal rows never stand on both sides, and added rows move no other.

    A single long document is cut near its end, at a line break. At least one row is held out, when fraction > 0.

    Raises: DataError when fewer than two distinct rows are there to split.
    """
    if not fraction:
        return list(items), []
    if len(items) == 1 and isinstance(items[0], Document):
        return _split_document(items[0], fraction)
    marks = [_share(item, seed) for item in items]
    limit = max(Fraction(fraction), min(marks, default=Fraction(0)))
    train = [item for item, mark in zip(items, marks, strict=True) if mark > limit]
    held_out = [item for item, mark in zip(items, marks, strict=True) if mark <= limit]
    if not train or not held_out:
        raise DataError(f"data.eval_fraction: {len(items)} rows cannot be split; give data.eval, or more rows")
    return train, held_out


def _share(item: Item, seed: int) -> Fraction:
    """A number in [0, 1) that depends on content and seed alone."""
    digest = hashlib.sha256(f"{seed}:{content_hash(item)}".encode()).digest()
    return Fraction(int.from_bytes(digest[:8], "big"), 2**64)


def _split_document(document: Document, fraction: float) -> tuple[list[Item], list[Item]]:
    at = document.text.rfind("\n", 0, int(len(document.text) * (1 - fraction))) + 1
    head, tail = document.text[:at], document.text[at:]
    if not head.strip() or not tail.strip():
        raise DataError("data.eval_fraction: a single document without line breaks cannot be split; give data.eval")
    return [Document(document.where, head)], [Document(document.where, tail)]
