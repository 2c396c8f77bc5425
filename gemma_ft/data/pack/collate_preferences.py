"""Pairs and labelled answers as one batch: each answer is a document of its own, in a sequence of its own or packed
with others, and numbered, so that what an objective asks of an answer does not depend on where it lies.

Letters: B sequences, T tokens, A answers, P pairs.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from gemma_ft.data.pack.collate import Collator
from gemma_ft.data.pack.packing import best_fit_decreasing
from gemma_ft.system.limits import IGNORE

DISTINCT = ("distinct_places", "distinct_firsts", "distinct_repeats")
OF_TOKENS = ("input_ids", "labels", "position_ids")
ROW_FIELDS = {"sides": torch.int64, "row_weights": torch.float32, "margins": torch.float32}


class PreferenceCollator:
    """A list of `PreferenceExamples` -> what `Collator` gives, and

    answer_ids int64 [B, T]: the number of the answer that a labelled token is of, -1 elsewhere; sides int64 [A]: 1
    chosen, or called good, 0 the other (of pair i, answers 2i and 2i + 1); row_weights and margins float32, [P] or, of
    labelled answers, [A]; where examples have them, reference_logprobs float64 [A].

    Two answers to one prompt: it is to be computed once. Where that, or padding, leaves fewer tokens than B x T, the
    batch says which they are: distinct_places int64 [B, T], distinct_firsts and distinct_repeats, as
    model.shared_tokens has them.

    `budget`: tokens of a sequence that several answers are packed into (None: each has its own).
    """

    def __init__(self, pad_id: int, *, multiple: int = 1, budget: int | None = None) -> None:
        self._plain, self.budget = Collator(pad_id, multiple=multiple), budget
        self._plain.padding |= {"answer_ids": -1, DISTINCT[0]: 0}

    def __call__(self, examples: Sequence[dict[str, list[Any]]]) -> dict[str, Tensor]:
        """The batch. A row without sides is blank: it has no answer."""
        answers = [one for example in examples for one in answers_of(example) if "sides" in example]
        for number, one in enumerate(answers):
            one["answer_ids"] = [number if label != IGNORE else -1 for label in one["labels"]]
        _number_tokens(answers)
        blank = [{**example, "answer_ids": [-1], DISTINCT[0]: [0]} for example in examples if "sides" not in example]
        batch = self._plain(self._sequences(answers) or blank)
        _tell_distinct(batch)
        rows = [example for example in examples if "sides" in example]
        for name, dtype in ROW_FIELDS.items():
            batch[name] = torch.tensor([value for row in rows for value in row[name]], dtype=dtype)
        if rows and all("reference_logprobs" in row for row in rows):
            found = [value for row in rows for value in row["reference_logprobs"]]
            batch["reference_logprobs"] = torch.tensor(found, dtype=torch.float64)
        return batch

    def _sequences(self, answers: Sequence[dict[str, list[Any]]]) -> list[dict[str, list[Any]]]:
        """Answers, one behind the other where several fit into a sequence."""
        lengths = [len(one["input_ids"]) for one in answers]
        alone = [[number] for number in range(len(answers))]
        packed = alone if self.budget is None else best_fit_decreasing(lengths, max([self.budget, *lengths]))
        names = (*OF_TOKENS, "answer_ids", DISTINCT[0])
        found = []
        for row in packed:
            sequence: dict[str, list[Any]] = {
                name: [value for number in row for value in answers[number][name]] for name in names
            }
            sequence["document_ids"] = [place for place, number in enumerate(row) for _ in range(lengths[number])]
            found.append(sequence)
        return found


def _number_tokens(answers: Sequence[dict[str, list[Any]]]) -> None:
    """Number the distinct tokens of answers that have not been packed yet. A prompt is shared by two answers at most:
    its gradient is then the same in either order of the sum.
    """
    waiting: dict[bytes, int] = {}  # a prompt's ids -> the number of its first token
    count = 0
    for one in answers:
        prompt = next((at for at, label in enumerate(one["labels"]) if label != IGNORE), 0)
        key = array("q", one["input_ids"][:prompt]).tobytes()
        begun = waiting.pop(key, None) if prompt else None
        if begun is None:
            waiting[key] = count
            fresh = 0
            head: list[int] = []
        else:
            head, fresh = list(range(begun, begun + prompt)), prompt
        more = len(one["input_ids"]) - fresh
        one[DISTINCT[0]] = [*head, *range(count, count + more)]
        count += more


def _tell_distinct(batch: dict[str, Tensor]) -> None:
    """Add where the distinct tokens of a batch stand, or take their numbers away where all are."""
    places, real = batch[DISTINCT[0]].flatten(), batch["attention_mask"].flatten().bool()
    numbers, firsts = numpy.unique(places.numpy(), return_index=True)  # the first token is the one of padding, too
    if len(numbers) == len(places):
        del batch[DISTINCT[0]]
        return
    batch[DISTINCT[1]] = torch.from_numpy(firsts)
    real[batch[DISTINCT[1]]] = False
    batch[DISTINCT[2]] = real.nonzero()[:, 0]


def answers_of(example: dict[str, list[Any]]) -> list[dict[str, list[Any]]]:
    """The documents of an example, apart: input_ids, labels and position_ids of each."""
    numbers = example["document_ids"]
    starts = [at for at in range(len(numbers)) if at == 0 or numbers[at] != numbers[at - 1]]
    cuts = zip(starts, [*starts[1:], len(numbers)], strict=True)
    return [{name: example[name][start:end] for name in OF_TOKENS} for start, end in cuts]
