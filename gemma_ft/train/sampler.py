"""Which rows a rank trains on, and when: a pure function of (seed, epoch, rank, ranks), so that a resumed run sees the
same rows, and every number of ranks the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from gemma_ft.data.encode.chat import IGNORE
from gemma_ft.data.pack.collate import PADDING


class StepBatches(Sampler[list[int]]):
    """The micro-batches of one rank, lists of row numbers, step after step.

    A step's rows are cut into micro-batches as on one rank, which are dealt to the ranks in turn. Every rank gets as
    many: where they do not go round in the last step of an epoch, a blank row (number `length`) fills in, which has no
    label and so changes nothing. `seed`: None keeps the rows in order. `tokens`: the lengths of the rows, where those
    of a step are to be cut longest first, so that little is padded; which rows are in a step stays as it is. Those of
    steps before `first_step`, which a resumed run passes over, need not be known.
    """

    def __init__(
        self,
        length: int,
        *,
        step_rows: int,
        micro_rows: int,
        seed: int | None,
        rank: int = 0,
        ranks: int = 1,
        tokens: Sequence[int] | None = None,
        first_step: int = 0,
    ) -> None:
        assert seed is None or step_rows % (micro_rows * ranks) == 0, "a step is dealt without a rest"
        self.length, self.step_rows, self.micro_rows, self.seed = length, step_rows, micro_rows, seed
        self.rank, self.ranks, self.epoch, self.tokens, self.first_step = rank, ranks, 0, tokens, first_step

    def rows_of_step(self, step: int) -> list[int]:
        """The rows of all ranks in a step of this epoch, counted from 0."""
        return list(self._order()[step * self.step_rows : (step + 1) * self.step_rows])

    def __len__(self) -> int:
        full, rest = divmod(self.length, self.step_rows)
        dealt = self.micro_rows * self.ranks
        return full * math.ceil(self.step_rows / dealt) + math.ceil(rest / dealt)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for start in range(0, self.length, self.step_rows):
            rows = list(order[start : start + self.step_rows])
            if self.tokens is not None and start >= self.first_step * self.step_rows:
                rows.sort(key=lambda row: -self.tokens[row])  # type: ignore[index]  # stable, as on any machine
            cuts = [rows[at : at + self.micro_rows] for at in range(0, len(rows), self.micro_rows)]
            cuts += [[self.length]] * (-len(cuts) % self.ranks)
            yield from cuts[self.rank :: self.ranks]

    def _order(self) -> Sequence[int]:
        if self.seed is None:
            return range(self.length)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order: list[int] = torch.randperm(self.length, generator=generator).tolist()
        return order


class WithBlank(Dataset[Mapping[str, Any]]):
    """Examples, and after the last one a blank row: one token of padding."""

    def __init__(self, examples: Sequence[Mapping[str, Any]], pad_id: int) -> None:
        self.examples = examples
        self.blank = {"input_ids": [pad_id], "labels": [IGNORE], "position_ids": [0], "document_ids": [PADDING]}

    def __len__(self) -> int:
        return len(self.examples) + 1

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        return self.blank if row == len(self.examples) else self.examples[row]


def placeholder(examples: Sequence[Mapping[str, Any]]) -> datasets.Dataset:
    """What SFTTrainer is given, for it takes nothing but a `Dataset`: the first example. DealtRows deals from all of
    them, wherever they lie.
    """
    return datasets.Dataset.from_list([dict(examples[0])])


class DealtRows:
    """The data loaders of a Trainer on one of several ranks. Mixed into GemmaTrainer, whose attributes it uses."""

    args: Any
    world: Any
    train_examples: Any
    eval_examples: Any
    progress: Any
    processing_class: Any
    data_collator: Any

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Trainer's own sampler draws its order from the global random state, which a resume cannot replay, and
        accelerate deals rows twice where they do not go round.
        """
        rows = self.args.per_device_train_batch_size
        self._sampler = self._batches(
            self.train_examples, rows, step_rows=rows * self.args.gradient_accumulation_steps * self.world.size
        )
        return self._loader(self.train_examples, self._sampler)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """This rank's part of the held-out rows, in their order; as many batches on every rank."""
        data = self.eval_examples
        return self._loader(data, self._batches(data, self.args.per_device_eval_batch_size, step_rows=None))

    def _batches(self, data: Any, rows: int, *, step_rows: int | None) -> StepBatches:
        return StepBatches(
            len(data),
            step_rows=step_rows or max(1, len(data)),
            micro_rows=rows,
            seed=self.args.seed if step_rows and not data.streamed else None,
            tokens=data.lengths if step_rows else None,
            first_step=self.progress.step if data.streamed else 0,
            rank=self.world.rank,
            ranks=self.world.size,
        )

    def _loader(self, data: Any, batches: StepBatches) -> DataLoader[Any]:
        rows = WithBlank(data, self.processing_class.pad_token_id)
        return DataLoader(rows, batch_sampler=batches, collate_fn=self.data_collator)
