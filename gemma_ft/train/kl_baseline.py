"""KTO's baseline z of a step, found before its gradients: how far the policy has moved from its reference on answers
that do not belong to their prompts. Source: arXiv:2402.01306 section 4.1.

Letters: A answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gemma_ft.data.pack.collate_preferences import OF_TOKENS
from gemma_ft.system.limits import IGNORE
from gemma_ft.train.distributed import World
from gemma_ft.train.micro_batch import Autocast
from gemma_ft.train.reference import Reference, answer_logprobs
from gemma_ft.train.sampler import Collate, Example, collated, dealt

HELD_OUT = -1  # in place of a step's number


@torch.no_grad()
def kl_baseline(
    model: Any,
    examples: Sequence[Example],
    reference: Reference,
    *,
    collate: Collate,
    pad_id: int,
    size: int,
    world: World,
    device: torch.device,
    autocast: Autocast,
    step: int,
) -> Tensor:
    """z = max(0, mean of log p - log q over some rows, each prompt with the answer of the next row), a scalar in
    float64. examples: those of all ranks, of which each computes its part, `size` at a time; z does not depend on it.
    step: whose rows they are, or HELD_OUT. All ranks call it.
    """
    if len(examples) < 2:  # the last row of an epoch alone: there is no other answer
        return torch.zeros((), dtype=torch.float64, device=device)
    asked, known = mismatched(examples), reference.mismatched.get(step)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for numbers in dealt(range(len(asked)), size, blank=len(asked), rank=world.rank, ranks=world.size):
        batch = collated(asked, numbers, collate, pad_id)
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        with autocast():
            own = answer_logprobs(model, inputs)
            if known is None:
                total += (own - reference.logprobs(model, inputs)).sum()
            else:
                total += own.sum() - sum(float(known[number]) for number in numbers if number < len(asked))
    (whole,) = world.sum([float(total)])
    return torch.tensor(max(0.0, whole / len(asked)), dtype=torch.float64, device=device)


def mismatched(examples: Sequence[Example]) -> list[Example]:
    """The prompt of each example with the answer of the next one, the last with that of the first; prompts lose their
    beginning where that is longer than any of the examples.
    """
    longest = max(len(one["input_ids"]) for one in examples)
    return [
        _joined(one, other, longest)
        for one, other in zip(examples, [*examples[1:], *examples[:1]], strict=True)
    ]  # fmt: skip


def _joined(asked: Example, answered: Example, longest: int) -> Example:
    """The prompt of one example and the answer of another, as one labelled answer."""
    head = asked["input_ids"][: _answer_start(asked)]
    start = _answer_start(answered)
    tail, labels = answered["input_ids"][start:], answered["labels"][start:]
    over = len(head) + len(tail) - longest
    if over > 0:
        head = [head[0], *head[1 + over :]]  # BOS stays
    size = len(head) + len(tail)
    columns: tuple[list[Any], ...] = (head + tail, [IGNORE] * len(head) + labels, list(range(size)))
    more = {"document_ids": [0] * size, "sides": [1], "row_weights": [1.0], "margins": [0.0]}
    return {**dict(zip(OF_TOKENS, columns, strict=True)), **more}


def _answer_start(example: Example) -> int:
    """Where what is trained of an example begins."""
    return next(at for at, label in enumerate(example["labels"]) if label != IGNORE)
