"""A stream as the examples that a trainer takes: as many as a run needs, in the order in which they come, the next
block read while one is trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, overload

import numpy

from gemma_ft.data.bad_rows import BadRows
from gemma_ft.data.dataset import DataStats
from gemma_ft.data.examples import Example
from gemma_ft.data.stream import Block, Cursor, Stream


class StreamedExamples(Sequence[Example]):
    """`total` examples of a stream. Those asked for go forward; of those behind, the blocks of the last `behind` are
    kept, and what lies before them is read again from where this began.

    `stats` counts what was read so far. `on_bad_rows` hears of rows that were left out, a block at a time.
    """

    streamed = True  # shuffled as they come: whoever deals them takes them in order

    def __init__(self, stream: Stream, *, total: int, behind: int) -> None:
        self.stream, self.total, self.behind = stream, total, behind
        self.on_bad_rows: Callable[[BadRows], None] = lambda rows: None
        self.weighted = any("weight" in one.reading.columns for one in stream.sources)
        self.lengths = _Lengths(self)
        self._pool = ThreadPoolExecutor(1, "stream")
        self._began = Cursor()
        self._read: Iterator[Block] = iter(())
        self._coming: Future[Block] | None = None
        self._blocks: list[Block] = []
        self.seek(Cursor())
        self.first = self._blocks[0]
        self.stats: DataStats = replace(self.first.prepared.stats)
        self.length_counts: Any = self.first.prepared.examples.length_counts
        self._counted = self._blocks[0].end

    def __len__(self) -> int:
        return self.total

    @overload
    def __getitem__(self, row: int) -> Example: ...

    @overload
    def __getitem__(self, row: slice) -> list[Example]: ...

    def __getitem__(self, row: int | slice) -> Example | list[Example]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        if not 0 <= row < self.total:
            raise IndexError(row)
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

    def cursor(self, row: int) -> dict[str, Any]:
        """Where reading begins for a run that goes on with an example, as `seek` takes it up."""
        return self._block(row).cursor.as_dict() if row < self.total else {}

    def seek(self, cursor: Cursor | dict[str, Any]) -> None:
        """Go on from where a block begins. Raises: DataError as `Stream.blocks`, now or when more is asked for."""
        self._began = Cursor.from_dict(cursor) if isinstance(cursor, dict) else cursor
        self._restart(self._began)

    def _restart(self, cursor: Cursor) -> None:
        if self._coming is not None:
            self._coming.exception()  # it is read to its end, and forgotten
            self._coming = None
        self._read, self._blocks = self.stream.blocks(cursor), []
        self._blocks = [next(self._read)]

    def _block(self, row: int) -> Block:
        if row < self._blocks[0].cursor.first:
            self._restart(self._began if self._began.first <= row else Cursor())
        while row >= self._blocks[-1].end:
            self._advance()
        newest = self._blocks[-1]
        if row > newest.cursor.first and self._coming is None:
            self._coming = self._pool.submit(next, self._read)
        return next(block for block in reversed(self._blocks) if block.cursor.first <= row)

    def _advance(self) -> None:
        coming = self._coming or self._pool.submit(next, self._read)
        self._coming = None
        block = coming.result()
        kept = [one for one in self._blocks if one.end > block.cursor.first - self.behind]
        self._blocks = [*kept, block]
        if block.end <= self._counted:  # read a second time
            return
        self._counted = block.end
        self.stats.add(block.prepared.stats)
        counts = (self.length_counts, block.prepared.examples.length_counts)
        self.length_counts = sum(numpy.pad(one, (0, max(map(len, counts)) - len(one))) for one in counts)
        if block.bad.count:
            self.on_bad_rows(block.bad)


class _Lengths(Sequence[int]):
    """Tokens of each example, known when it has come."""

    def __init__(self, examples: StreamedExamples) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, row: Any) -> Any:
        return self._examples.tokens(row)
