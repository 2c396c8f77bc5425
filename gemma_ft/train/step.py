"""One optimizer step, in reading order: its rows, micro-batches, forward, loss, backward, agreement of ranks, clip,
update, figures.

Letters: B sequences of a micro-batch, T tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemma_ft.train.distributed import World
from gemma_ft.train.fsdp import gradients_deferred, whole
from gemma_ft.train.objectives.registry import Objective
from gemma_ft.train.sampler import Batch, Collate, Example, StepRows, collated

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "document_ids", "labels")  # the rest is the objective's


@dataclass
class StepParts:
    """What a step is made of, on one rank."""

    step: int  # of the run, counted from 0
    model: Any  # as DDP or FSDP2 wraps it
    optimizer: Any
    objective: Objective
    examples: Sequence[Example]
    rows: StepRows
    collate: Collate
    pad_id: int
    world: World
    device: torch.device
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]
    seed: int
    max_grad_norm: float  # 0: gradients are not clipped
    computing: bool = False  # True during forward and backward, while no weight changes


@dataclass(frozen=True)
class StepFigures:
    """What a step came to, on all ranks together."""

    loss: float  # the objective's, over its divisor
    grad_norm: float  # before it was clipped
    learning_rate: float
    tokens: int  # of the input, without padding and blank rows
    finite: bool  # where not, the update was left out


def optimizer_step(parts: StepParts) -> StepFigures:
    """Train on the rows of a step. All ranks call it."""
    rows = parts.rows.micro_batches(parts.step)
    batches = [collated(parts.examples, some, parts.collate, parts.pad_id) for some in rows]
    divisors = _divisors(parts, batches)
    parts.computing = True
    loss, tokens = _accumulate_gradients(parts, batches, divisors)
    parts.computing = False
    norm = _clip_gradients(parts)
    finite = not parts.world.any(not (math.isfinite(norm) and math.isfinite(loss)))
    learning_rate = float(parts.optimizer.param_groups[0]["lr"])
    if finite:
        parts.optimizer.step()
    parts.model.zero_grad()
    loss, counted = parts.world.sum([loss, tokens])
    return StepFigures(loss, norm, learning_rate, round(counted), finite)


def _divisors(parts: StepParts, batches: Sequence[Batch]) -> Tensor:
    """What each term of the step's loss is divided by, once: what the objective counts in all micro-batches of all
    ranks, [terms].
    """
    own = [sum(of_term) for of_term in zip(*map(parts.objective.divisors, batches), strict=True)]
    counted = [count or 1.0 for count in parts.world.sum(own)]
    return torch.tensor(counted, dtype=torch.float64, device=parts.device)


def _accumulate_gradients(parts: StepParts, batches: Sequence[Batch], divisors: Tensor) -> tuple[float, float]:
    """Forward and backward over this rank's micro-batches; gradients of ranks are summed in the last one's backward.
    Returns this rank's parts of the loss and of the count of tokens.

    What dropout draws is a function of the seed, the step and the micro-batch, as one rank counts them: the same after
    a resume, and on any number of ranks.
    """
    loss, tokens = torch.zeros((), device=parts.device), torch.zeros((), device=parts.device, dtype=torch.int64)
    for number, batch in enumerate(batches):
        torch.manual_seed(_mixed(parts.seed, parts.step, number * parts.world.size + parts.world.rank))
        last = number == len(batches) - 1
        with contextlib.nullcontext() if last else gradients_deferred(parts.model):
            value, count = forward_backward(parts, batch, divisors)
        loss, tokens = loss + value, tokens + count
    return float(loss), float(tokens)


def forward_backward(parts: StepParts, batch: Batch, divisors: Tensor) -> tuple[Tensor, Tensor]:
    """One micro-batch: its gradients are added to those that are there. Returns its parts of loss and tokens."""
    inputs = {name: tensor.to(parts.device) for name, tensor in batch.items()}
    parts.model.train()
    with parts.autocast():
        loss, value = micro_batch_loss(parts.model, inputs, parts.objective, divisors)
    (loss * parts.world.size).backward()  # gradients are averaged over ranks, and are to be summed
    return value, (inputs["document_ids"] >= 0).sum()


def micro_batch_loss(model: Any, inputs: Batch, objective: Objective, divisors: Tensor) -> tuple[Tensor, Tensor]:
    """(a loss to call backward on, the value of the objective for the log) of one micro-batch, its terms over the
    divisors [terms].

    grad objective = Σ_t (∂objective / ∂log p[t]) · grad log p[t], and the head's loss is Σ_t w[t] · (−log p[t]):
    with w[t] = −∂objective / ∂log p[t], of either sign, both have one gradient. Where the objective needs no
    log-probabilities it has one term, and the head's loss is its value as well: its weights go in undivided. Else the
    head gives them first, without a gradient, and each term is divided in the weights.
    """
    labels, values = inputs["labels"], []
    once = torch.ones_like(divisors)
    within, after = (divisors, once[0]) if objective.needs_logprobs else (once, divisors[0])

    def weights(logprobs: Tensor) -> Tensor:
        value, found = token_weights(objective, logprobs, inputs, within)
        values.append(value)
        return found

    given = weights if objective.needs_logprobs else weights(torch.zeros_like(labels, dtype=torch.float32))
    known = {name: tensor for name, tensor in inputs.items() if name in MODEL_INPUTS}
    # num_items_in_batch: what GemmaForCausalLM._loss divides by, under transformers' name
    outputs = model(**{**known, "loss_weights": given}, use_cache=False, num_items_in_batch=after)
    value = values[0] if objective.needs_logprobs else outputs.loss
    return outputs.loss, value.detach()


def token_weights(objective: Objective, logprobs: Tensor, inputs: Batch, divisors: Tensor) -> tuple[Tensor, Tensor]:
    """(the objective's value, minus its derivative by each log-probability [B, T]), its terms over the divisors
    [terms], both detached.
    """
    with torch.enable_grad(), torch.autocast(logprobs.device.type, enabled=False):
        logprobs = logprobs.detach().requires_grad_()
        value = _divided(objective(logprobs, inputs), divisors)
        if not value.requires_grad:  # it has no term: a blank row
            return value, torch.zeros_like(logprobs)
        (slope,) = torch.autograd.grad(value, logprobs)
    return value.detach(), -slope


def _divided(terms: Sequence[Tensor], divisors: Tensor) -> Tensor:
    """Each term over its divisor, summed."""
    return torch.stack([term / divisor for term, divisor in zip(terms, divisors, strict=True)]).sum()


def _clip_gradients(parts: StepParts) -> float:
    """The norm of all gradients, which are then scaled to `max_grad_norm` where it is larger."""
    limit = parts.max_grad_norm or math.inf
    return float(whole(torch.nn.utils.clip_grad_norm_(parts.model.parameters(), limit)))


def _mixed(*numbers: int) -> int:
    """One seed out of several numbers, unlike that of any numbers near them."""
    digest = hashlib.blake2b(":".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**63
