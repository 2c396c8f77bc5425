"""Which rows a rank trains on, and when: a pure function of (seed, step, rank, ranks), so that a resumed run sees the
same rows, and every number of ranks the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gemma_ft.data.pack.collate import PADDING
from gemma_ft.data.pack.examples import Examples
from gemma_ft.data.pack.streamed import StreamedExamples
from gemma_ft.recipe.batch_plan import BatchPlan
from gemma_ft.system.limits import IGNORE

Example = Mapping[str, Any]
Batch = dict[str, torch.Tensor]
Collate = Callable[[Sequence[Any]], Batch]


class StepRows:
    """The rows of each optimizer step of a run, and the micro-batches in which one rank computes them.

    `length`: rows of an epoch. `seed`: None keeps them in order. `tokens`: the length of each row, where the rows of a
    step are to be cut longest first, so that little is padded; which rows are in a step stays as it is. Of a step that
    is not asked for nothing need be known.
    """

    def __init__(self, length: int, plan: BatchPlan, *, seed: int | None, rank: int = 0, tokens: Any = None) -> None:
        self.length, self.plan, self.seed, self.rank, self.tokens = length, plan, seed, rank, tokens
        self._epoch, self._order = -1, list[int]()  # of the epoch that was dealt last

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which each row is trained once; the last may have fewer rows."""
        return math.ceil(self.length / self.plan.global_batch_size)

    def rows_of_step(self, step: int) -> list[int]:
        """The rows of all ranks in a step of the run, counted from 0."""
        epoch, number = divmod(step, self.steps_per_epoch)
        start = number * self.plan.global_batch_size
        return list(self._order_in(epoch)[start : start + self.plan.global_batch_size])

    def micro_batches(self, step: int) -> list[list[int]]:
        """This rank's micro-batches of a step, lists of row numbers, `length` standing for the blank row."""
        rows = self.rows_of_step(step)
        if self.tokens is not None:
            rows.sort(key=lambda row: -self.tokens[row])  # stable, as on any machine
        return dealt(rows, self.plan.micro_batch_size, blank=self.length, rank=self.rank, ranks=self.plan.ranks)

    def _order_in(self, epoch: int) -> Sequence[int]:
        if self.seed is None:
            return range(self.length)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            self._epoch, self._order = epoch, torch.randperm(self.length, generator=generator).tolist()
        return self._order


@dataclass(frozen=True)
class TrainingData:
    """Examples that are already tokens, labels and document ids, and what makes a batch of them."""

    train: Examples | StreamedExamples
    held_out: Examples | None
    collate: Collate


def dealt(rows: Sequence[int], size: int, *, blank: int, rank: int, ranks: int) -> list[list[int]]:
    """One rank's batches of at most `size` rows: they are cut as on one rank, and dealt to the ranks in turn. Every
    rank gets as many: where they do not go round a blank row fills in, which has no label and so changes nothing.
    """
    cuts = [list(rows[at : at + size]) for at in range(0, len(rows), size)]
    cuts += [[blank]] * (-len(cuts) % ranks)
    return cuts[rank::ranks]


def blank_row(pad_id: int) -> Example:
    """One token of padding."""
    return {"input_ids": [pad_id], "labels": [IGNORE], "position_ids": [0], "document_ids": [PADDING]}


def collated(examples: Sequence[Example], rows: Sequence[int], collate: Collate, pad_id: int) -> Batch:
    """Rows of `examples` as one batch of tensors; the number behind the last example is the blank row."""
    return collate([examples[row] if row < len(examples) else blank_row(pad_id) for row in rows])


def held_out_batches(
    examples: Sequence[Example], collate: Collate, pad_id: int, *, size: int, rank: int, ranks: int
) -> Iterator[Batch]:
    """This rank's part of the held-out rows, in their order; as many batches on every rank."""
    for rows in dealt(range(len(examples)), size, blank=len(examples), rank=rank, ranks=ranks):
        yield collated(examples, rows, collate, pad_id)
