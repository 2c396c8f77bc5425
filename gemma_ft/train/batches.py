"""Which rows a rank trains on, and when: a pure function of (seed, epoch, rank, ranks), so that a resumed run sees the
same rows, and every number of ranks the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from gemma_ft.data.chat import IGNORE
from gemma_ft.data.collate import PADDING


class StepBatches(Sampler[list[int]]):
    """The micro-batches of one rank, lists of row numbers, step after step.

    A step's rows are cut into micro-batches as on one rank, which are dealt to the ranks in turn. Every rank gets as
    many: where they do not go round in the last step of an epoch, a blank row (number `length`) fills in, which has no
    label and so changes nothing. `seed`: None keeps the rows in order.
    """

    def __init__(
        self, length: int, *, step_rows: int, micro_rows: int, seed: int | None, rank: int = 0, ranks: int = 1
    ) -> None:
        assert seed is None or step_rows % (micro_rows * ranks) == 0, "a step is dealt without a rest"
        self.length, self.step_rows, self.micro_rows, self.seed = length, step_rows, micro_rows, seed
        self.rank, self.ranks, self.epoch = rank, ranks, 0

    def rows_of_step(self, step: int) -> list[int]:
        """The rows of all ranks in a step of this epoch, counted from 0."""
        return self._order()[step * self.step_rows : (step + 1) * self.step_rows]

    def __len__(self) -> int:
        full, rest = divmod(self.length, self.step_rows)
        dealt = self.micro_rows * self.ranks
        return full * math.ceil(self.step_rows / dealt) + math.ceil(rest / dealt)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for start in range(0, self.length, self.step_rows):
            rows = order[start : start + self.step_rows]
            cuts = [rows[at : at + self.micro_rows] for at in range(0, len(rows), self.micro_rows)]
            cuts += [[self.length]] * (-len(cuts) % self.ranks)
            yield from cuts[self.rank :: self.ranks]

    def _order(self) -> list[int]:
        if self.seed is None:
            return list(range(self.length))
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        return torch.randperm(self.length, generator=generator).tolist()


class WithBlank(Dataset[Mapping[str, Any]]):
    """Examples, and after the last one a blank row: one token of padding."""

    def __init__(self, examples: Sequence[Mapping[str, Any]], pad_id: int) -> None:
        self.examples = examples
        self.blank = {"input_ids": [pad_id], "labels": [IGNORE], "position_ids": [0], "document_ids": [PADDING]}

    def __len__(self) -> int:
        return len(self.examples) + 1

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        return self.blank if row == len(self.examples) else self.examples[row]
