"""The rows of a source with their items and places, a chunk at a time, as a check and a fix both read them."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from gemma_ft.data.conversation import Conversation, Item, Pair, texts_of
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.encode_rows import Reading
from gemma_ft.data.read.bad_rows import BadRows
from gemma_ft.data.read.chunks import Chunk

Side = Literal["train", "eval"]


@dataclass(frozen=True)
class RowSource:
    """Rows that are trained on, or held out, and how they are read."""

    side: Side
    name: str
    chunks: Callable[[], Iterable[Chunk]]  # from its beginning, each time it is asked
    reading: Reading
    why: str  # it is read so


@dataclass(frozen=True)
class CheckedRow:
    """One row that is whole: its offset in the chunk, and what it became."""

    offset: int
    items: Sequence[Item | Pair]

    @property
    def said(self) -> list[Item]:
        """Its items, of a pair its two halves."""
        return [one for item in self.items for one in (item.halves if isinstance(item, Pair) else (item,))]

    def digests(self, encoder: ChatEncoder) -> list[bytes]:
        """A hash of all that each item says."""
        return [_digest(item, encoder) for item in self.items]

    def prompts(self, encoder: ChatEncoder) -> list[bytes]:
        """The hashes of the prompts of answers that are preferred or not; of other items none."""
        asked = [item for item in self.items if isinstance(item, Pair) or getattr(item, "label", None) is not None]
        return list(dict.fromkeys(encoder.content_hash(item) for item in asked))

    def apart(self, encoder: ChatEncoder) -> list[bytes]:
        """The hashes of what may not be both trained and held out: prompts of preferences, other items whole."""
        return self.prompts(encoder) or self.digests(encoder)

    def verdicts(self, encoder: ChatEncoder) -> list[tuple[bytes, bool]]:
        """(a hash of the answers that are judged, in an order of their own, how they are judged) of each preference."""
        found = []
        for item in self.items:
            if isinstance(item, Pair):
                good, bad = (encoder.content_hash(half) for half in item.halves)
                found.append((min(good, bad) + max(good, bad), good < bad))
            elif isinstance(item, Conversation) and item.label is not None:
                found.append((encoder.content_hash(replace(item, label=None)), item.label))
        return found

    def texts(self) -> list[str]:
        """All that it says."""
        return [text for item in self.said for text in texts_of(item)]


def _digest(item: Item | Pair, encoder: ChatEncoder) -> bytes:
    if isinstance(item, Pair):
        return hashlib.sha256(b"".join(encoder.content_hash(half) for half in item.halves)).digest()
    if isinstance(item, Conversation) and item.label is not None:
        return hashlib.sha256(encoder.content_hash(replace(item, label=None)) + bytes([item.label])).digest()
    return encoder.content_hash(item)


def rows_in(chunk: Chunk, reading: Reading, bad: BadRows) -> list[CheckedRow]:
    """The rows of a chunk; those that are none are added to `bad`."""
    found = reading.items(chunk, bad)
    return [
        CheckedRow(offset, [item for _, item in group]) for offset, group in groupby(found, key=lambda pair: pair[0])
    ]


def repeats(digests: Sequence[bytes], seen: dict[bytes, int]) -> int | None:
    """The row that had the first of these items before, where each of them was there; None where one is new."""
    return seen[digests[0]] if all(digest in seen for digest in digests) else None


class CountedBadRows(BadRows):
    """Hands each bad row on instead of keeping the first few."""

    def __init__(self, tell: Callable[[str, str], None]) -> None:
        super().__init__()
        self._tell = tell

    def add(self, where: str, reason: str) -> None:
        """One bad row, told at once."""
        self.count += 1
        self._tell(where, reason)


class Places:
    """Where rows stand, by number in the order they came: two numbers are kept of each."""

    def __init__(self) -> None:
        self._chunks: list[Chunk] = []
        self._parts = array("l")
        self._offsets = array("q")

    def __len__(self) -> int:
        return len(self._parts)

    def begin(self, chunk: Chunk) -> None:
        """The rows that follow are of this chunk."""
        self._chunks.append(chunk.bare())

    def add(self, offset: int) -> int:
        """The number of one more row."""
        self._parts.append(len(self._chunks) - 1)
        self._offsets.append(offset)
        return len(self) - 1

    def where(self, row: int) -> str:
        """The place as a user finds it."""
        return self._chunks[self._parts[row]].where(self._offsets[row])
