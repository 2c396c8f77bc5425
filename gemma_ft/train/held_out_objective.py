"""A preference objective on held-out rows: its loss and its figures, the model in eval mode.

Letters: A answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gemma_ft.evaluate.held_out import held_out_loss
from gemma_ft.evaluate.statistics import wilson
from gemma_ft.train.kl_baseline import HELD_OUT, kl_baseline
from gemma_ft.train.micro_batch import Autocast, means_of, prepared, summed
from gemma_ft.train.objectives.registry import Figures, Objective
from gemma_ft.train.reference import Reference, known_to_model, token_logprobs
from gemma_ft.train.sampler import Batch

ACCURACY = "rewards/accuracies"
Total = Callable[[Sequence[float]], list[float]]


@dataclass(frozen=True)
class HeldOutScore:
    """The loss over held-out rows, None where there are none, and the objective's figures."""

    loss: float | None
    figures: dict[str, float | None] = field(default_factory=dict)


@torch.no_grad()
def held_out_objective(
    model: Any,
    batches: Iterable[Batch],
    objective: Objective,
    reference: Reference,
    *,
    device: torch.device,
    autocast: Autocast,
    sum_over_ranks: Total,
    more: Callable[[], Batch] = dict,
    stop: Callable[[], bool] = lambda: False,
) -> HeldOutScore:
    """`sum_over_ranks`: what each of several ranks found -> what all of them found. `more`: what an objective asks of
    all rows together, computed before. `stop`: asked before each batch; where it says so, the rest is left out. The
    model is in eval mode meanwhile and as it was afterwards.
    """
    was_training = model.training
    model.eval()
    of_all = more()
    values: list[list[float]] = []
    divisors: list[tuple[float, ...]] = []
    figures: list[Figures] = []
    for batch in batches:
        if stop():
            break
        inputs = {**prepared(model, batch, objective, reference, device, autocast), **of_all}
        with autocast():
            given = given_to_objective(model, inputs, objective)
        values.append([float(term) for term in objective(given, inputs)])
        divisors.append(objective.divisors(inputs))
        figures.append(objective.figures(given, inputs))
    model.train(was_training)
    own = [sum(of_term) for of_term in (*zip(*values, strict=True), *zip(*divisors, strict=True))]
    sums = sum_over_ranks(own)
    terms = len(sums) // 2
    if not terms or not sums[terms]:
        return HeldOutScore(None)
    loss = sum(value / count for value, count in zip(sums[:terms], sums[terms:], strict=True) if count)
    return HeldOutScore(loss, _with_interval(summed(figures), sum_over_ranks))


def _with_interval(figures: Figures, sum_over_ranks: Total) -> dict[str, float | None]:
    """Figures of all ranks, and of the share of pairs that are ordered right its 95% interval."""
    found = means_of(figures, sum_over_ranks)
    share = found.get(ACCURACY)
    if share is None:
        return found
    (count,) = sum_over_ranks([figures[ACCURACY][1]])
    low, high = wilson(share, count)
    return {**found, f"{ACCURACY}_low": low, f"{ACCURACY}_high": high}


def held_out_score(
    trainer: Any, stop: Callable[[], bool] = lambda: False, advance: Callable[[int], None] = lambda batches: None
) -> HeldOutScore:
    """The loss of a trainer's objective over its held-out rows, and its figures, of the model as it is now; `stop`
    leaves the rest out, `advance` hears how many batches more are done. All ranks call it.
    """
    model, objective, world = trainer.model, trainer.objective, trainer.world
    batches, autocast = _told(trainer.held_out_batches(), advance), trainer.autocast_context
    if objective.rows == "answers":
        return HeldOutScore(held_out_loss(model, batches, autocast=autocast, sum_over_ranks=world.sum, stop=stop))
    collate, pad_id = trainer.data.collate, trainer.processing_class.pad_token_id
    device, rows = trainer.args.device, trainer.data.held_out

    def baseline() -> Batch:
        """What the objective asks of all held-out rows together."""
        if not objective.needs_baseline or not rows:
            return {}
        size = trainer.args.per_device_eval_batch_size
        found = kl_baseline(
            model, rows[:], trainer.reference, collate=collate, pad_id=pad_id, size=size, world=world, device=device,
            autocast=autocast, step=HELD_OUT,
        )  # fmt: skip
        return {"kl_baseline": found}

    return held_out_objective(
        model, batches, objective, trainer.reference, device=device, autocast=autocast, sum_over_ranks=world.sum,
        more=baseline, stop=stop,
    )  # fmt: skip


def _told(batches: Iterable[Batch], advance: Callable[[int], None]) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        advance(1)  # whoever asks for the next one has done this


@torch.no_grad()
def given_to_objective(model: Any, inputs: Batch, objective: Objective) -> Tensor:
    """What an objective is a function of, of the model in its mode: log-probabilities [B, T], or rewards [A]."""
    if objective.scores:
        rewards: Tensor = model(**known_to_model(inputs), answer_ids=inputs["answer_ids"], use_cache=False).rewards
        return rewards.double()
    return token_logprobs(model, inputs)
