"""Documents of sources that are never read whole: a block at a time, mixed, shuffled and packed within it, pass after
pass. What a block holds follows from where it begins, so that a resumed run takes up the same documents.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy

from gemma_ft.data.encode.documents import Documents, Part
from gemma_ft.data.encode.encode_rows import Reading, encoded_chunk
from gemma_ft.data.pack.arrange import DataStats, Prepared, TooLong, arrange, refuse_without_ends, share_of, untrainable
from gemma_ft.data.read.bad_rows import BadRows
from gemma_ft.data.read.chunks import Chunk
from gemma_ft.errors import DataError
from gemma_ft.system.row_kind import DOCUMENTS_OF

BLOCK_DOCUMENTS = 10_000  # what is shuffled together; some four blocks are in memory at a time
BLOCK_TOKENS = 2**23
GRAB = 100  # documents of a source that follow each other before they are shuffled


@dataclass(frozen=True)
class StreamSource:
    """Rows that are read again for each pass, and how they become documents."""

    name: str
    chunks: Callable[[], Iterator[Chunk]]
    reading: Reading
    most: int | None  # of its documents that are used; None: all
    repeats: float  # how often in a pass; of a fraction those documents whose content hash says so
    rate: float  # how fast it is read beside the others
    endless: bool  # it begins again by itself when it was read, as those with weights do: there is one pass then
    split: str | None = None  # of the files in its folder, where others are left out


@dataclass(frozen=True)
class SourcePosition:
    """Where a source is to be read on: its repetition, its chunk, the document in it, and documents so far."""

    repetition: int = 0
    chunk: int = 0
    document: int = 0
    read: int = 0  # in this repetition
    dealt: int = 0  # in this pass


@dataclass(frozen=True)
class Cursor:
    """Where a block begins."""

    passed: int = 0  # passes over the sources
    block: int = 0  # of this pass
    first: int = 0  # number of its first example in the run
    rows: int = 0  # read in this pass so far
    bad: int = 0  # of them left out
    places: tuple[SourcePosition, ...] = ()  # of the sources; none: all at their beginning

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, said: dict[str, Any]) -> Cursor:
        """What `as_dict` gave, out of JSON."""
        return cls(**{**said, "places": tuple(SourcePosition(**one) for one in said["places"])})


@dataclass(frozen=True)
class Block:
    """The examples of some documents, in the order of training."""

    cursor: Cursor
    prepared: Prepared
    order: Sequence[int]
    bad: BadRows  # that were left out
    chats: bool  # whether any document is one

    @property
    def end(self) -> int:
        """The number of the first example behind it."""
        return self.cursor.first + len(self.order)


@dataclass(frozen=True)
class Arranging:
    """How documents become examples; as dataset.arrange takes it."""

    max_seq_len: int
    packing: bool
    too_long: TooLong


@dataclass(frozen=True)
class Stream:
    """Sources, and how blocks are made of them. `held_out`: content hashes of documents that are not to be trained."""

    sources: Sequence[StreamSource]
    arranging: Arranging
    seed: int
    held_out: frozenset[bytes]
    skip_bad_rows: bool

    def blocks(self, cursor: Cursor) -> Iterator[Block]:
        """Blocks without end, from one on.

        Raises: DataError for rows that are bad (or too many of them are), and for a pass of which nothing is trained.
        """
        at, found = cursor, cursor.block > 0
        unused = DataStats()
        while True:
            lanes = [_Lane(one, place) for one, place in zip(self.sources, at.places or self._begin(), strict=True)]
            while not self._over(lanes):
                places = tuple(lane.place for lane in lanes)
                here = replace(at, places=places)
                block = self._block(here, lanes)
                rows, bad = at.rows + block.prepared.stats.rows + block.bad.count, at.bad + block.bad.count
                at = Cursor(at.passed, at.block + 1, block.end, rows, bad)
                if block.order:
                    if not found:
                        refuse_without_ends(block.prepared.stats, self.sources[0].reading.encoder, chats=block.chats)
                    found = True
                    yield block
                elif not found:
                    unused.add(block.prepared.stats)
                    if all(lane.place.repetition for lane in lanes):  # all was read, though it would begin again
                        break
            if not found:
                names = ", ".join(one.name for one in self.sources)
                raise DataError(f"{names}: {untrainable(unused, self.arranging.max_seq_len)}")
            at, found = Cursor(at.passed + 1, first=at.first), False

    def fingerprint(self) -> str:
        """SHA-256 (hex) of what can be known of the training documents without reading them all: the settings, and the
        first rows of each source.
        """
        told: list[Any] = [asdict(self.arranging), self.seed, sorted(one.hex() for one in self.held_out)]
        told.append([one.rate for one in self.sources])  # what is mixed with what: of one source nothing
        for one in self.sources:
            first = next(one.chunks(), None)
            told += [one.name, one.most, one.repeats, one.reading.key(first) if first is not None else None]
            told += [one.split] if one.split is not None else []
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def _begin(self) -> tuple[SourcePosition, ...]:
        return (SourcePosition(),) * len(self.sources)

    def _over(self, lanes: Sequence[_Lane]) -> bool:
        return all(lane.over for lane in lanes)

    def _block(self, cursor: Cursor, lanes: Sequence[_Lane]) -> Block:
        bad, parts = BadRows(), []
        chosen: list[Any] = []
        documents = tokens = overlap = 0
        while documents < BLOCK_DOCUMENTS and tokens < BLOCK_TOKENS and not self._over(lanes):
            lane = min((lane for lane in lanes if not lane.over), key=lambda lane: lane.place.dealt / lane.source.rate)
            for part, share in lane.take(GRAB, bad):
                contents = part.table.column("content").to_pylist()
                meant = [share == 1 or share_of(one.hex(), self.seed) < share for one in contents]
                kept = [row for row, one in enumerate(contents) if meant[row] and one not in self.held_out]
                overlap += sum(meant) - len(kept)
                chosen.append(documents + numpy.array(kept, numpy.int64))
                parts.append(part)
                documents += len(contents)
                tokens += int(part.table.column("tokens").to_numpy().sum())
        self._settle(cursor, bad, sum(part.items for part in parts))
        whole = Documents(parts)
        prepared = arrange(
            whole,
            self.sources[0].reading.encoder,
            **vars(self.arranging),
            chosen=numpy.concatenate([numpy.zeros(0, numpy.int64), *chosen]),
            refuse=False,
            weighted=any("weight" in one.reading.columns for one in self.sources),
        )
        prepared.stats.overlapping = overlap
        order = list(range(len(prepared.examples)))
        random.Random(f"{self.seed}:{cursor.passed}:{cursor.block}").shuffle(order)
        return Block(cursor, prepared, order, bad, chats=bool(whole.column("chat").any()))

    def _settle(self, cursor: Cursor, bad: BadRows, items: int) -> None:
        """Raises: DataError where bad rows are not to be skipped, or are too many of those that a pass has read."""
        if not self.skip_bad_rows:
            bad.raise_if_any()
        so_far = BadRows()
        so_far.extend(bad)
        so_far.count += cursor.bad
        so_far.raise_if_many(cursor.rows + items + bad.count)


class _Lane:
    """One source while it is read."""

    def __init__(self, source: StreamSource, place: SourcePosition) -> None:
        self.source, self.place = source, place
        self._chunks: Iterator[Chunk] | None = None
        self._part: Part | None = None

    @property
    def over(self) -> bool:
        """Whether it gives no more in this pass."""
        return not self.source.endless and self.place.repetition >= self.source.repeats

    def take(self, count: int, bad: BadRows) -> Iterator[tuple[Part, float]]:
        """Some further documents, fewer at the end, and which share of them is meant in this repetition; of a row all
        or none, which may be one more.
        """
        while count > 0 and not self.over:
            part, place = self._opened(bad), self.place
            if part is None or place.read == self.source.most:
                if self.source.endless and not place.read:
                    raise DataError(f"{self.source.name}: has a weight, and no document that can be read; take it out")
                self.place = SourcePosition(place.repetition + 1, dealt=place.dealt)
                self._chunks = self._part = None
                continue
            left = len(part.table) - place.document
            each = DOCUMENTS_OF[part.rows]
            taken = min(-(-count // each) * each, left, (self.source.most or sys.maxsize) - place.read)
            if taken:
                share = 1.0 if self.source.endless else min(1.0, self.source.repeats - place.repetition)
                yield part.sliced(place.document, place.document + taken), share
            read, dealt = place.read + taken, place.dealt + taken
            if taken == left:
                self._part = None
                self.place = SourcePosition(place.repetition, place.chunk + 1, 0, read, dealt)
            else:
                self.place = SourcePosition(place.repetition, place.chunk, place.document + taken, read, dealt)
            count -= taken

    def _opened(self, bad: BadRows) -> Part | None:
        """The chunk that is being read, its bad rows told when it is begun; None behind the last."""
        if self._part is not None:
            return self._part
        if self._chunks is None:
            self._chunks = itertools.islice(self.source.chunks(), self.place.chunk, None)
        chunk = next(self._chunks, None)
        if chunk is None:
            return None
        self._part = Part(encoded_chunk(self.source.reading, chunk), chunk.bare().where)
        if not (self.place.document or self.place.repetition):
            meant = (self.source.most or sys.maxsize) - self.place.read
            last = self._part.offset(meant - 1) if len(self._part.table) >= meant else sys.maxsize
            for where, reason in self._part.bad_until(last):
                bad.add(where, reason)
        return self._part
