"""One optimizer step, in reading order: its rows, micro-batches, forward, loss, backward, agreement of ranks, clip,
update, figures.

Letters: B sequences of a micro-batch, T tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gemma_ft.train.distributed import World
from gemma_ft.train.fsdp import gradients_deferred, whole
from gemma_ft.train.kl_baseline import kl_baseline
from gemma_ft.train.micro_batch import MicroBatch, divisors_of, means_of, micro_batch_loss, prepared, summed
from gemma_ft.train.objectives.registry import Figures, Objective
from gemma_ft.train.reference import Reference
from gemma_ft.train.sampler import Batch, Collate, Example, StepRows, collated


@dataclass
class StepParts:
    """What a step is made of, on one rank."""

    step: int  # of the run, counted from 0
    model: Any  # as DDP or FSDP2 wraps it
    optimizer: Any
    objective: Objective
    reference: Reference
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
    shown: dict[str, float | None] = field(default_factory=dict)  # the objective's own figures


def optimizer_step(parts: StepParts) -> StepFigures:
    """Train on the rows of a step. All ranks call it."""
    rows = parts.rows.micro_batches(parts.step)
    batches = [collated(parts.examples, some, parts.collate, parts.pad_id) for some in rows]
    divisors = divisors_of(parts.objective, batches, parts.world.sum).to(parts.device)
    parts.computing = True
    of_step = {"kl_baseline": _baseline(parts)} if parts.objective.needs_baseline else {}
    loss, tokens, figures = _accumulate_gradients(parts, [{**batch, **of_step} for batch in batches], divisors)
    parts.computing = False
    norm = _clip_gradients(parts)
    finite = not parts.world.any(not (math.isfinite(norm) and math.isfinite(loss)))
    learning_rate = float(parts.optimizer.param_groups[0]["lr"])
    if finite:
        parts.optimizer.step()
    parts.model.zero_grad()
    loss, counted = parts.world.sum([loss, tokens])
    shown = means_of(figures, parts.world.sum) if figures else {}
    return StepFigures(loss, norm, learning_rate, round(counted), finite, shown)


def _baseline(parts: StepParts) -> Tensor:
    """Of all rows of the step together."""
    parts.model.train()
    examples = [parts.examples[row] for row in parts.rows.rows_of_step(parts.step)]
    return kl_baseline(
        parts.model, examples, parts.reference, collate=parts.collate, pad_id=parts.pad_id, world=parts.world,
        size=parts.rows.plan.micro_batch_size, device=parts.device, autocast=parts.autocast,
        step=parts.step,
    )  # fmt: skip


def _accumulate_gradients(parts: StepParts, batches: Sequence[Batch], divisors: Tensor) -> tuple[float, float, Figures]:
    """Forward and backward over this rank's micro-batches; gradients of ranks are summed in the last one's backward.
    Returns this rank's parts of the loss, of the count of tokens, and of the objective's figures.

    What dropout draws is a function of the seed, the step and the micro-batch, as one rank counts them: the same after
    a resume, and on any number of ranks.
    """
    loss, tokens = torch.zeros((), device=parts.device), torch.zeros((), device=parts.device, dtype=torch.int64)
    entropy, figures = torch.zeros(2, device=parts.device, dtype=torch.float64), list[Figures]()
    for number, batch in enumerate(batches):
        torch.manual_seed(_mixed(parts.seed, parts.step, number * parts.world.size + parts.world.rank))
        last = number == len(batches) - 1
        with contextlib.nullcontext() if last else gradients_deferred(parts.model):
            found, count = forward_backward(parts, batch, divisors)
        loss, tokens, entropy = loss + found.value, tokens + count, entropy + found.entropy
        figures.append(found.figures)
    own = {} if parts.objective.scores else {"entropy": tuple(entropy.tolist())}
    return float(loss), float(tokens), {**summed(figures), **own}


def forward_backward(parts: StepParts, batch: Batch, divisors: Tensor) -> tuple[MicroBatch, Tensor]:
    """One micro-batch: its gradients are added to those that are there. Returns what it came to, and its tokens."""
    parts.model.train()
    inputs = prepared(parts.model, batch, parts.objective, parts.reference, parts.device, parts.autocast)
    with parts.autocast():
        found = micro_batch_loss(parts.model, inputs, parts.objective, divisors)
    (found.loss * parts.world.size).backward()  # gradients are averaged over ranks, and are to be summed
    return found, (inputs["document_ids"] >= 0).sum()


def _clip_gradients(parts: StepParts) -> float:
    """The norm of all gradients, which are then scaled to `max_grad_norm` where it is larger."""
    limit = parts.max_grad_norm or math.inf
    return float(whole(torch.nn.utils.clip_grad_norm_(parts.model.parameters(), limit)))


def _mixed(*numbers: int) -> int:
    """One seed out of several numbers, unlike that of any numbers near them."""
    digest = hashlib.blake2b(":".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**63
