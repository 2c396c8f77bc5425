"""Pairs and labelled answers -> the examples a trainer takes: one pair each, or one answer. A pair is cut or dropped as
a pair, and no answer loses its end: what was cut must not be compared as if it had ended.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy

from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.documents import COUNTS, Documents
from gemma_ft.data.pack.examples import Example, Examples
from gemma_ft.data.pack.stats import DataStats
from gemma_ft.data.read.bad_rows import BadRows
from gemma_ft.system.limits import IGNORE


class PreferenceExamples(Examples):
    """As `Examples`, of one pair each (its chosen half and the rejected one as two documents), or of one labelled
    answer. `example[i]` also has, for each of its documents, `sides` (1: chosen, or called good; 0: the other), and for
    the row `row_weights` (one number) and `margins` (one number, 0 where the data has none); and `reference_logprobs`
    of each document where they were computed before.
    """

    def __init__(self, documents: Documents, pieces: Any, rows: Sequence[Sequence[int]], bos: int) -> None:
        super().__init__(documents, pieces, rows, bos)
        self.weighted = False  # a weight is of a row, not of its tokens
        self._sides, self._margins = documents.preferences()
        self.reference: Any = None  # float64 [pieces in the order of the examples]

    def example(self, row: int) -> Example:
        """See the class."""
        example = super().example(row)
        named = self.pieces_of(row)[:, 0]
        example["sides"] = self._sides[named].tolist()
        example["row_weights"] = [self.weight(int(named[0]))]
        example["margins"] = [float(self._margins[named[0]])]
        if self.reference is not None:
            example["reference_logprobs"] = self.reference[self.places_of(row)].tolist()
        return example

    @property
    def longest_sequence(self) -> int:
        """Of an answer with its prompt: the two of a pair are sequences of their own."""
        return len(self.length_counts) - 1

    def labels(self) -> tuple[int, int]:
        """How many documents are chosen or called good, and how many are not."""
        good = int(self._sides[self.pieces[:, 0]].sum())
        return good, len(self.pieces) - good

    def one_label(self) -> str | None:
        """Why labelled answers cannot be learned from, in words: all of them are called the same; else None."""
        good, bad = self.labels()
        if self.documents.rows != "labelled" or (good and bad) or not good + bad:
            return None
        return (
            f"all {good + bad:,} answers are called {'good' if good else 'bad'}; objective kto learns from both: add "
            "rows with the other label, or set objective.kind: sft for good answers alone"
        )

    def places_of(self, row: int) -> slice:
        """Where an example's documents stand among those of all examples."""
        return slice(int(self._starts[row]), int(self._starts[row + 1]))

    def fingerprint(self) -> str:
        """SHA-256 (hex): equal exactly when the same tokens are compared in the same order, to the same end."""
        digest = hashlib.sha256(super().fingerprint().encode())
        numbers = self.in_order()[0][:, 0]
        for values in (self._sides, self._margins, self._weights):
            digest.update(values[numbers].tobytes())
        return digest.hexdigest()


def arrange_preferences(
    documents: Documents, encoder: ChatEncoder, *, max_seq_len: int, too_long: str, chosen: Any, stats: DataStats
) -> PreferenceExamples:
    """Examples of the documents with these numbers, of pairs of either half of them; counts go into `stats`.

    too_long: "auto" and "drop" leave a row out of which an answer with its prompt is longer than max_seq_len;
    "truncate_left" takes as much from the beginning of the prompt as the longer one asks for, from both; "error"
    refuses it. Raises: DataError.
    """
    pairs = documents.rows == "pairs"
    if pairs:
        chosen = chosen[documents.preferences()[0][chosen] == 1]
        stats.rows = len(chosen)
    halves = numpy.stack([chosen, chosen + 1], axis=1) if pairs else chosen[:, None]  # [rows, documents of each]
    count = {name: documents.column(name)[halves] for name in COUNTS}
    longest, trained = count["tokens"].max(axis=1, initial=0), count["trained"].min(axis=1, initial=2**31)
    over = (longest > max_seq_len) & (trained > 0)
    stats.untrained = int((trained == 0).sum())
    stats.left_out_turns = int(count["left_out"].sum())
    stats.dropped_system = int(count["system"][:, :1].sum()) if encoder.system_policy == "drop" else 0
    if too_long == "error":
        _refuse_long(documents, halves[over], longest[over], max_seq_len)
    starts = numpy.zeros(len(halves), numpy.int64)
    if too_long == "truncate_left":
        starts[over] = longest[over] - max_seq_len + 1  # a BOS of its own comes in front
        gone = [row for row in numpy.flatnonzero(over).tolist() if not _asks(documents, halves[row], int(starts[row]))]
        stats.dropped, stats.truncated = len(gone), int(over.sum()) - len(gone)
        over = numpy.isin(numpy.arange(len(halves)), gone)
    else:
        stats.too_long = int(over.sum())
    kept = ~over & (trained > 0)
    halves, starts = halves[kept], starts[kept]
    pieces = numpy.zeros((halves.size, 3), numpy.int64)
    pieces[:, 0], pieces[:, 1] = halves.reshape(-1), numpy.repeat(starts, halves.shape[1])
    pieces[:, 2] = count["tokens"][kept].reshape(-1)
    stats.trained_tokens = int(count["trained"][kept].sum())
    stats.terminators = int(count["terminators"][kept].sum())
    rows = numpy.arange(halves.size).reshape(halves.shape).tolist()
    return PreferenceExamples(documents, pieces, rows, encoder.control.bos)


def _asks(documents: Documents, halves: Any, start: int) -> bool:
    """Whether something of the question is left where documents begin at `start`."""
    return all(bool((documents.cut(int(one), 0, start + 1)[1] == IGNORE).all()) for one in halves)


def _refuse_long(documents: Documents, halves: Any, tokens: Any, limit: int) -> None:
    bad = BadRows()
    for row, size in zip(halves.tolist(), tokens.tolist(), strict=True):
        bad.add(documents.where(row[0]), f"{size:,} tokens, more than data.max_seq_len {limit} (data.too_long: error)")
    bad.raise_if_any()
