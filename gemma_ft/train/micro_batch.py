"""One micro-batch: forward, the objective's value, its derivative put into the head, figures.

Letters: B sequences of a micro-batch, T tokens, A answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gemma_ft.train.objectives.registry import Figures, Objective
from gemma_ft.train.reference import Reference, known_to_model
from gemma_ft.train.sampler import Batch

Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass
class MicroBatch:
    """What a micro-batch came to: a loss to call backward on, the value of the objective for the log, both over the
    step's divisors; float64 [2]: the entropy of what is predicted for labelled tokens, summed, and how many there are
    (zeros where no token is predicted); and the sums of its figures.
    """

    loss: Tensor
    value: Tensor
    entropy: Tensor
    figures: Figures = field(default_factory=dict)


def prepared(
    model: Any, batch: Batch, objective: Objective, reference: Reference, device: torch.device, autocast: Autocast
) -> Batch:
    """A collated batch on the device, with the reference's log-probabilities where the objective compares with one."""
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    if objective.needs_reference and "reference_logprobs" not in inputs:
        if not reference.live and not len(inputs["sides"]):  # a blank row, which no example brings any for
            return {**inputs, "reference_logprobs": torch.zeros(0, dtype=torch.float64, device=device)}
        with autocast():
            inputs["reference_logprobs"] = reference.logprobs(model, inputs)
    return inputs


def micro_batch_loss(model: Any, inputs: Batch, objective: Objective, divisors: Tensor) -> MicroBatch:
    """The forward pass of a micro-batch, its terms over the divisors [terms].

    grad objective = Σ_t (∂objective / ∂log p[t]) · grad log p[t], and the head's loss is Σ_t w[t] · (−log p[t]):
    with w[t] = −∂objective / ∂log p[t], of either sign, both have one gradient. Where the objective needs no
    log-probabilities it has one term, and the head's loss is its value as well: its weights go in undivided. Else the
    head gives them first, without a gradient, and each term is divided in the weights.
    """
    if objective.scores:
        return _of_rewards(model, inputs, objective, divisors)
    labels, values, figures = inputs["labels"], list[Tensor](), list[Figures]()
    once = torch.ones_like(divisors)
    within, after = (divisors, once[0]) if objective.needs_logprobs else (once, divisors[0])

    def weights(logprobs: Tensor) -> Tensor:
        value, found = token_weights(objective, logprobs, inputs, within)
        values.append(value)
        figures.append(objective.figures(logprobs, inputs))
        return found

    given = weights if objective.needs_logprobs else weights(torch.zeros_like(labels, dtype=torch.float32))
    # num_items_in_batch: what GemmaForCausalLM._loss divides by, under transformers' name
    outputs = model(**{**known_to_model(inputs), "loss_weights": given}, use_cache=False, num_items_in_batch=after)
    value = values[0] if objective.needs_logprobs else outputs.loss
    entropy = torch.stack((outputs.entropy_sum.double(), outputs.token_count.double()))
    return MicroBatch(outputs.loss, value.detach(), entropy, figures[0])


def _of_rewards(model: Any, inputs: Batch, objective: Objective, divisors: Tensor) -> MicroBatch:
    """The same of an objective over one number for each answer, which a reward model gives."""
    rewards = model(**known_to_model(inputs), answer_ids=inputs["answer_ids"], use_cache=False).rewards
    with torch.autocast(rewards.device.type, enabled=False):
        value = divided(objective(rewards.double(), inputs), divisors)
    nothing = torch.zeros(2, dtype=torch.float64, device=value.device)
    return MicroBatch(value, value.detach(), nothing, objective.figures(rewards.detach(), inputs))


def token_weights(objective: Objective, logprobs: Tensor, inputs: Batch, divisors: Tensor) -> tuple[Tensor, Tensor]:
    """(the objective's value, minus its derivative by each log-probability [B, T]), its terms over the divisors
    [terms], both detached.
    """
    with torch.enable_grad(), torch.autocast(logprobs.device.type, enabled=False):
        logprobs = logprobs.detach().requires_grad_()
        value = divided(objective(logprobs, inputs), divisors)
        if not value.requires_grad:  # it has no term: a blank row
            return value, torch.zeros_like(logprobs)
        (slope,) = torch.autograd.grad(value, logprobs)
    return value.detach(), -slope


def divided(terms: Sequence[Tensor], divisors: Tensor) -> Tensor:
    """Each term over its divisor, summed."""
    return torch.stack([term / divisor for term, divisor in zip(terms, divisors, strict=True)]).sum()


def divisors_of(
    objective: Objective, batches: Sequence[Batch], total: Callable[[Sequence[float]], list[float]]
) -> Tensor:
    """What each term of a step's loss is divided by, once: what the objective counts in all micro-batches of all
    ranks, [terms] in float64. total: each rank's counts -> those of all.
    """
    own = [sum(of_term) for of_term in zip(*map(objective.divisors, batches), strict=True)]
    return torch.tensor([count or 1.0 for count in total(own)], dtype=torch.float64)


def summed(several: Sequence[Figures]) -> Figures:
    """Sums of figures, numerators and denominators apart."""
    found: Figures = {}
    for one in several:
        for name, (value, count) in one.items():
            before = found.get(name, (0.0, 0.0))
            found[name] = before[0] + value, before[1] + count
    return found


def means_of(figures: Figures, total: Callable[[Sequence[float]], list[float]]) -> dict[str, float | None]:
    """Figures of all ranks, each numerator over its denominator; None where there is nothing to divide by. Rows that
    are good or bad by themselves have no pairs: their margin is what lies between the two means.
    """
    names = sorted(figures)
    sums = total([value for name in names for value in figures[name]])
    means = {name: sums[2 * at] / sums[2 * at + 1] if sums[2 * at + 1] else None for at, name in enumerate(names)}
    if "rewards/chosen" in means and "rewards/margins" not in means:
        chosen, rejected = means["rewards/chosen"], means["rewards/rejected"]
        means["rewards/margins"] = None if chosen is None or rejected is None else chosen - rejected
    return means
