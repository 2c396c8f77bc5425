"""Batches of pairs and of labelled answers as tensors, for tests of objectives: ids in, what the collator gives out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_ft.train.micro_batch import micro_batch_loss
from gemma_ft.train.objectives.answers import summed_logprobs
from gemma_ft.train.objectives.registry import Objective
from gemma_ft.train.reference import MODEL_INPUTS

Row = tuple[list[int], list[int]]  # a prompt, an answer
Pair = tuple[list[int], list[int], list[int]]  # a prompt, its chosen and its rejected answer


def pairs_batch(
    pairs: Sequence[Pair],
    *,
    packed: bool = False,
    weights: Sequence[float] | None = None,
    margins: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """Answer 2i is the chosen, 2i + 1 the rejected one of pair i."""
    rows = [(prompt, answer) for prompt, *answers in pairs for answer in answers]
    sequences = _sequences(rows, packed)
    return sequences | {
        "sides": torch.tensor([1, 0] * len(pairs)),
        "row_weights": torch.tensor(weights or [1.0] * len(pairs)),
        "margins": torch.tensor(margins or [0.0] * len(pairs)),
    }


def labelled_batch(
    rows: Sequence[tuple[list[int], list[int], bool]],
    *,
    packed: bool = False,
    weights: Sequence[float] | None = None,
    baseline: float = 0.0,
) -> dict[str, Tensor]:
    """A prompt, an answer, and whether it is a good one."""
    sequences = _sequences([(prompt, answer) for prompt, answer, _ in rows], packed)
    return sequences | {
        "sides": torch.tensor([int(good) for _, _, good in rows]),
        "row_weights": torch.tensor(weights or [1.0] * len(rows)),
        "kl_baseline": torch.tensor(baseline),
    }


def blank_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What fills up a rank beside micro-batches like `batch`."""
    padding = {"input_ids": 0, "labels": -100, "position_ids": 0, "document_ids": -1, "answer_ids": -1}
    blank = {name: torch.full((1, 1), value) for name, value in padding.items()}
    per_row = ("sides", "row_weights", "margins", "reference_logprobs")
    kept = {name: tensor[:0] for name, tensor in batch.items() if name in per_row}
    return {**batch, **blank, "attention_mask": torch.ones(1, 1, dtype=torch.int64), **kept}


def drawn_pairs(count: int, *, vocab: int, seed: int = 0) -> list[Pair]:
    """Random ids in answers of unequal length."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return [2, *torch.randint(4, vocab, (length,), generator=generator).tolist()][-length:]

    return [(ids(3 + n % 3), ids(2 + n % 4), ids(5 - n % 3)) for n in range(count)]


def in_place(
    batch: dict[str, Tensor], answers: Sequence[Sequence[float]], dtype: torch.dtype = torch.float64
) -> Tensor:
    """Log-probabilities of each answer's tokens -> [B, T], where their labels are."""
    found = torch.zeros(batch["labels"].shape, dtype=dtype)
    for number, values in enumerate(answers):
        found[batch["answer_ids"] == number] = torch.tensor(values, dtype=dtype)
    return found


def full_logprobs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Log-probabilities of labels [B, T] as a textbook has them: whole logits, differentiable."""
    known = {name: batch[name] for name in MODEL_INPUTS if name != "labels"}
    logits = model.train()(**known, use_cache=False, skip_logits=False).logits
    targets = batch["labels"][:, 1:]
    found = logits[:, :-1].log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    return F.pad(torch.where(targets == -100, 0.0, found), (1, 0))


@torch.no_grad()
def head_logprobs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The same from the fused head, without a gradient, in eval mode."""
    kept: list[Tensor] = []

    def keep(logprobs: Tensor) -> Tensor:
        kept.append(logprobs)
        return logprobs

    known = {name: batch[name] for name in MODEL_INPUTS}
    model.eval()(**known, use_cache=False, skip_logits=True, loss_weights=keep)
    return kept[0]


def with_reference(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch, with the answers' log-probabilities under `model` for its reference."""
    return {**batch, "reference_logprobs": summed_logprobs(head_logprobs(model, batch), batch)}


def divisors_of(objective: Objective, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """[terms], of all batches together."""
    return torch.tensor([objective.divisors(batch) for batch in batches], dtype=torch.float64).sum(dim=0)


def loss_of(objective: Objective, logprobs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a step of one micro-batch."""
    terms = objective(logprobs, batch)
    return sum(term / divisor for term, divisor in zip(terms, objective.divisors(batch), strict=True))


def gradient(model: Any) -> Tensor:
    """Of all that is trained, as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def through_the_seam(model: Any, batches: Sequence[dict[str, Tensor]], objective: Objective) -> tuple[float, Tensor]:
    """(loss, gradient) of a step cut into `batches`, as the loop computes them."""
    model.zero_grad()
    divisors, value = divisors_of(objective, batches), 0.0
    for batch in batches:
        found = micro_batch_loss(model.train(), batch, objective, divisors)
        found.loss.backward()
        value += float(found.value)
    return value, gradient(model)


def over_full_logits(model: Any, batches: Sequence[dict[str, Tensor]], objective: Objective) -> tuple[float, Tensor]:
    """(loss, gradient) of the same step by autograd through whole logits."""
    model.zero_grad()
    divisors, value = divisors_of(objective, batches), 0.0
    for batch in batches:
        terms = objective(full_logprobs(model, batch), batch)
        loss = sum(term / divisor for term, divisor in zip(terms, divisors, strict=True))
        loss.backward()
        value += float(loss.detach())
    return value, gradient(model)


def _sequences(rows: Sequence[Row], packed: bool) -> dict[str, Tensor]:
    documents = [
        {
            "input_ids": prompt + answer,
            "labels": [-100] * len(prompt) + answer,
            "position_ids": list(range(len(prompt + answer))),
            "document_ids": [number if packed else 0] * len(prompt + answer),
            "answer_ids": [-1] * len(prompt) + [number] * len(answer),
            "attention_mask": [1] * len(prompt + answer),
        }
        for number, (prompt, answer) in enumerate(rows)
    ]
    if packed:
        documents = [{name: [value for one in documents for value in one[name]] for name in documents[0]}]
    longest = max(len(one["input_ids"]) for one in documents)
    padding = {"labels": -100, "document_ids": -1, "answer_ids": -1}
    return {
        name: torch.tensor([one[name] + [padding.get(name, 0)] * (longest - len(one[name])) for one in documents])
        for name in documents[0]
    }
