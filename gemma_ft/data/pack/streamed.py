"""A stream as the examples that a trainer takes: as many as a run needs, in the order in which they come, the next
block read while one is trained on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy

from gemma_ft.data.pack.arrange import DataStats
from gemma_ft.data.pack.examples import Example, ExampleRows
from gemma_ft.data.pack.stream import Block, Cursor, Stream
from gemma_ft.data.read.bad_rows import BadRows

ASK_SECONDS = 0.5  # between two questions whether to go on waiting for a block


class StreamedExamples(ExampleRows):
    """`total` examples of a stream. Those asked for go forward; of those behind, the blocks of the last `behind` are
    kept, and what lies before them is read again from where this began.

    `on_bad_rows` hears of rows that were left out, a block at a time; `waiting` is called while a block is awaited, and
    may raise.
    """

    streamed = True  # shuffled as they come: whoever deals them takes them in order

    def __init__(self, stream: Stream, *, total: int, behind: int) -> None:
        self.stream, self.total, self.behind = stream, total, behind
        self.on_bad_rows: Callable[[BadRows], None] = lambda rows: None
        self.waiting: Callable[[], None] = lambda: None
        self.weighted = any("weight" in one.reading.columns for one in stream.sources)
        self.lengths = _Lengths(self)
        self.counts = self._origin = self._read_so_far = StreamCounts()
        self._counted = 0  # examples that `counts` are of
        self._before: dict[int, StreamCounts] = {}  # of what came before a block, by the number of its first example
        self._began = Cursor()
        self._read: Iterator[Block] = iter(())
        self._coming: Future[Block] | None = None
        self._blocks: list[Block] = []
        self._restart(self._began, self._origin)
        self.first = self._blocks[0]

    def __len__(self) -> int:
        return self.total

    def example(self, row: int) -> Example:
        """See the class."""
        block = self._block(row)
        return block.prepared.examples[block.order[row - block.cursor.first]]

    def tokens(self, row: int) -> int:
        """Tokens of an example."""
        block = self._block(row)
        return int(block.prepared.examples.lengths[block.order[row - block.cursor.first]])

    def wheres(self, row: int) -> list[str]:
        """Where an example's documents stand in the source."""
        block = self._block(row)
        return block.prepared.examples.wheres(block.order[row - block.cursor.first])

    def longest(self, count: int) -> list[Example]:
        """The longest examples of the first block."""
        return self.first.prepared.examples.longest(count)

    def fingerprint(self) -> str:
        """SHA-256 (hex), as `Stream.fingerprint`: not all of the data is known."""
        return self.stream.fingerprint()

    def state(self, row: int) -> dict[str, Any]:
        """Where reading begins for a run that goes on with an example, and what was counted until there, for JSON."""
        block = self._block(min(row, self.total - 1))
        return {"cursor": block.cursor.as_dict(), **self._before[block.cursor.first].as_dict()}

    def go_on(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave. Raises: DataError as `Stream.blocks`, now or when more is asked for."""
        self._began, self._origin = Cursor.from_dict(state["cursor"]), StreamCounts.from_dict(state)
        self._counted, self.counts = self._began.first, self._origin
        self._restart(self._began, self._origin)

    @property
    def stats(self) -> DataStats:
        """What became of the rows that were read, before a resume as well."""
        return self.counts.stats

    @property
    def length_counts(self) -> Any:
        """How many documents that were read have 0, 1, 2, ... tokens."""
        return self.counts.lengths

    def _restart(self, cursor: Cursor, before: StreamCounts) -> None:
        self._read_so_far, self._before = before, {}
        self._coming = None  # what is on its way is read to its end, and forgotten
        self._read, self._blocks = self.stream.blocks(cursor), []
        self._took(next(self._read))

    def _block(self, row: int) -> Block:
        if row < self._blocks[0].cursor.first:
            again = self._began.first <= row
            self._restart(*((self._began, self._origin) if again else (Cursor(), StreamCounts())))
        while row >= self._blocks[-1].end:
            self._took(self._awaited(self._coming or self._ahead()))
        newest = self._blocks[-1]
        if newest.cursor.first < row and newest.end < self.total and self._coming is None:
            self._coming = self._ahead()
        return next(block for block in reversed(self._blocks) if block.cursor.first <= row)

    def _ahead(self) -> Future[Block]:
        """The next block, read by a thread that ends with the process."""
        future: Future[Block] = Future()
        read = self._read

        def work() -> None:
            try:
                future.set_result(next(read))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, daemon=True, name="stream").start()
        return future

    def _awaited(self, coming: Future[Block]) -> Block:
        self._coming = coming
        while True:
            try:
                block = coming.result(ASK_SECONDS)
            except NotYet:
                if coming.done():  # it is the stream's own
                    raise
                self.waiting()
            else:
                self._coming = None
                return block

    def _took(self, block: Block) -> None:
        kept = [one for one in self._blocks if one.end > block.cursor.first - self.behind]
        self._blocks = [*kept, block]
        self._before = {one.cursor.first: self._before[one.cursor.first] for one in kept}
        self._before[block.cursor.first] = self._read_so_far
        self._read_so_far = self._read_so_far.and_of(block)
        if block.end > self._counted:  # not read a second time
            self._counted, self.counts = block.end, self._read_so_far
            if block.bad.count:
                self.on_bad_rows(block.bad)


@dataclass(frozen=True)
class StreamCounts:
    """What became of the rows that were read, and how many documents have 0, 1, 2, ... tokens."""

    stats: DataStats = field(default_factory=DataStats)
    lengths: Any = field(default_factory=lambda: numpy.zeros(1, numpy.int64))

    def and_of(self, block: Block) -> StreamCounts:
        """With those of a further block."""
        stats, more = replace(block.prepared.stats), block.prepared.examples.length_counts
        if self.stats.rows or self.stats.overlapping:
            stats.add(self.stats)
        size = max(len(self.lengths), len(more))
        padded = [numpy.pad(one, (0, size - len(one))) for one in (self.lengths, more)]
        return StreamCounts(stats, padded[0] + padded[1])

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        sizes = numpy.flatnonzero(self.lengths).tolist()
        return {"stats": asdict(self.stats), "lengths": {str(size): int(self.lengths[size]) for size in sizes}}

    @classmethod
    def from_dict(cls, said: dict[str, Any]) -> StreamCounts:
        """What `as_dict` gave, out of JSON."""
        found = {int(size): count for size, count in said["lengths"].items()}
        lengths = numpy.zeros(max(found, default=0) + 1, numpy.int64)
        lengths[list(found)] = list(found.values())
        return cls(DataStats(**{**said["stats"], "weights": tuple(said["stats"]["weights"])}), lengths)


class _Lengths(Sequence[int]):
    """Tokens of each example, known when it has come."""

    def __init__(self, examples: StreamedExamples) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, row: Any) -> Any:
        return self._examples.tokens(row)
