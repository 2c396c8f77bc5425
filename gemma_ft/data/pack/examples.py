"""The examples a trainer takes: one piece of a document each, or several packed. They are put together when asked for,
so that a data set need not fit into memory.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, overload

import numpy

from gemma_ft.data.encode.documents import Documents
from gemma_ft.system.limits import IGNORE

Example = dict[str, list[Any]]


class ExampleRows(Sequence[Example]):
    """What a trainer takes examples from: by number, or several at once."""

    @overload
    def __getitem__(self, row: int) -> Example: ...

    @overload
    def __getitem__(self, row: slice) -> list[Example]: ...

    def __getitem__(self, row: int | slice) -> Example | list[Example]:
        if isinstance(row, slice):
            return [self.example(number) for number in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        return self.example(row % len(self))

    @abstractmethod
    def example(self, row: int) -> Example:
        """One of them, counted from 0."""


class Examples(ExampleRows):
    """Rows of pieces. A piece is (document, start, end): those tokens, with BOS in front where it does not begin with
    the document. `example[i]`: input_ids, labels, position_ids, document_ids, lists of equal length; each document's
    positions start at 0, and its first label is masked. Where not all documents have the weight 1 (`weighted`), also
    loss_weights: of each token.
    """

    streamed = False  # whoever deals them shuffles them

    def __init__(
        self, documents: Documents, pieces: Any, rows: Sequence[Sequence[int]], bos: int, weighted: bool = False
    ) -> None:
        self.documents, self.pieces, self.bos = documents, pieces, bos
        self._flat = numpy.fromiter((piece for row in rows for piece in row), numpy.int64)
        self._starts = numpy.concatenate([[0], numpy.cumsum([len(row) for row in rows])]).astype(numpy.int64)
        sizes = piece_tokens(pieces)[self._flat]
        self.length_counts = numpy.bincount(sizes)  # how many pieces have 0, 1, 2, ... tokens
        self._weights = documents.weights()
        self.weighted = weighted or bool((self._weights[pieces[:, 0]] != 1).any())
        self.lengths = numpy.add.reduceat(sizes, self._starts[:-1]) if len(rows) else sizes  # tokens of each example

    def __len__(self) -> int:
        return len(self._starts) - 1

    def example(self, row: int) -> Example:
        """See the class."""
        example: Example = {"input_ids": [], "labels": [], "position_ids": [], "document_ids": []}
        for number, piece in enumerate(self.pieces_of(row)):
            ids, labels = self._tokens(piece)
            example["input_ids"] += ids
            example["labels"] += labels
            example["position_ids"] += range(len(ids))
            example["document_ids"] += [number] * len(ids)
            if self.weighted:
                example.setdefault("loss_weights", []).extend([self.weight(piece[0])] * len(ids))
        return example

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence that a batch is made of."""
        return int(max(self.lengths))

    def longest(self, count: int) -> list[Example]:
        """The longest examples, so many at most."""
        return [self[row] for row in numpy.argsort(-self.lengths, kind="stable")[:count].tolist()]

    def wheres(self, row: int) -> list[str]:
        """Where an example's documents stand in the source."""
        return [self.documents.where(int(document)) for document, _, _ in self.pieces_of(row)]

    def weight(self, document: int) -> float:
        """Of a document's tokens in the loss."""
        return float(self._weights[document])

    def fingerprint(self) -> str:
        """SHA-256 (hex): equal exactly when the same tokens are trained in the same order."""
        digest = hashlib.sha256()
        for row in range(len(self)):
            digest.update(b"row")
            for document, start, end in self.pieces_of(row):
                ids, labels = self.documents.cut(int(document), int(start), int(end))
                for part in (numpy.array([start > 0, len(ids)], numpy.int64), ids, labels):
                    digest.update(part.tobytes())
                if self.weighted:
                    digest.update(self._weights[document].tobytes())
        return digest.hexdigest()

    def pieces_of(self, row: int) -> Any:
        """The pieces of an example, in their order: int64 [pieces of it, 3]."""
        return self.pieces[self._flat[self._starts[row] : self._starts[row + 1]]]

    def in_order(self) -> tuple[Any, Any]:
        """(pieces of all examples, one example after the other: int64 [P, 3]; the number of each one's example: int64
        [P]).
        """
        return self.pieces[self._flat], numpy.repeat(numpy.arange(len(self)), numpy.diff(self._starts))

    def _tokens(self, piece: Any) -> tuple[list[int], list[int]]:
        document, start, end = map(int, piece)
        ids, labels = (array.tolist() for array in self.documents.cut(document, start, end))
        if start:
            return [self.bos, *ids], [IGNORE, *labels]
        assert labels[0] == IGNORE, "a document's first token is never predicted from the document before"
        return ids, labels


def piece_tokens(pieces: Any) -> Any:
    """Tokens of each piece, a BOS in front of it included: int64 [pieces]."""
    return pieces[:, 2] - pieces[:, 1] + (pieces[:, 1] > 0)


def steps_per_epoch(examples: int, global_batch_size: int) -> int:
    """Optimizer steps over so many examples; the last may be a smaller batch."""
    return -(-examples // global_batch_size)
