"""The proof that a run of preferences starts where it says: before the first step policy and reference are one model,
so that rewards, margins and KL are 0 and the loss is a number that is known.

Letters: A answers.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gemma_ft.errors import UserError
from gemma_ft.train.held_out_objective import given_to_objective
from gemma_ft.train.kl_baseline import kl_baseline
from gemma_ft.train.micro_batch import divided, divisors_of, prepared
from gemma_ft.train.objectives.answers import answer_lengths, summed_logprobs
from gemma_ft.train.sampler import Batch, collated

FLOAT32 = 1e-6  # per token, for log-probabilities that were computed before and are computed again
LOSS = 1e-6


@dataclass(frozen=True)
class ZeroProof:
    """What was found over the first micro-batches of all ranks."""

    loss: float  # the objective's first term
    expected: float
    answers: int
    largest_difference: float  # per token, between policy and reference
    allowed: float

    def told(self, *, scores: bool) -> str:
        """In one line; `scores`: of a reward model."""
        how = "exactly 0" if self.largest_difference == 0 else f"0 to {self.largest_difference:.1e} per token"
        what = "rewards and margins" if scores else "rewards, margins and KL"
        return f"loss {self.loss:.6f} as it must be at the start; {what} {how}, {self.answers} answers"

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint and summary.json."""
        return asdict(self)


@torch.no_grad()
def zero_proof(trainer: Any) -> ZeroProof | None:
    """The proof of a trainer's objective before its first step; None where nothing is known of its start: without a
    reference, or with another model for one. All ranks call it.

    Raises: UserError where a difference is larger than allowed, with the largest and its place.
    """
    objective, reference, world = trainer.objective, trainer.reference, trainer.world
    if not (objective.scores or reference.live or reference.kind == "precomputed"):
        return None
    trainer.model.train()
    rows = trainer.step_rows().micro_batches(0)[0]
    batch = collated(trainer.data.train, rows, trainer.data.collate, trainer.processing_class.pad_token_id)
    device, autocast = trainer.args.device, trainer.autocast_context
    inputs = prepared(trainer.model, batch, objective, reference, device, autocast)
    if objective.needs_baseline:
        inputs["kl_baseline"] = _baseline(trainer)
    with autocast():
        given = given_to_objective(trainer.model, inputs, objective)
    expected = objective.loss_at_start(inputs)
    if expected is None:
        return None
    divisors = divisors_of(objective, [inputs], world.sum).to(device)
    terms = objective(given, inputs)
    found, known = world.sum([float(divided(terms[:1], divisors[:1])), expected / float(divisors[0])])
    differences = _differences(given, inputs, scores=objective.scores)
    largest = max(world.gather(float(differences.max()) if len(differences) else 0.0))
    spread = 0.0 if objective.scores or reference.live else max(world.gather(_spread(trainer, rows, given, inputs)))
    allowed = 0.0 if objective.scores or reference.live else max(FLOAT32, spread)
    proof = ZeroProof(found, known, round(world.sum([float(len(differences))])[0]), largest, allowed)
    loose = LOSS if allowed == 0 else max(LOSS, 100 * allowed)
    if largest > allowed or not math.isfinite(found) or abs(found - known) > loose * max(1.0, abs(known)):
        where = _where(trainer, rows, differences)
        raise UserError(
            f"the objective does not start at its reference: loss {found:.6f}, expected {known:.6f}; log-probabilities "
            f"differ by up to {largest:.2e} per token (allowed: {allowed:.2e}), at {where}; this run would learn from "
            "a wrong comparison: report it, with this line"
        )
    return proof


def _baseline(trainer: Any) -> Tensor:
    """KTO's z of the first step."""
    examples = [trainer.data.train[row] for row in trainer.step_rows().rows_of_step(0)]
    return kl_baseline(
        trainer.model, examples, trainer.reference, collate=trainer.data.collate, world=trainer.world,
        pad_id=trainer.processing_class.pad_token_id, size=trainer.batch.micro_batch_size,
        device=trainer.args.device, autocast=trainer.autocast_context, step=0,
    )  # fmt: skip


def _differences(given: Tensor, inputs: Batch, *, scores: bool) -> Tensor:
    """|log p - log q| of each answer per token, or the size of each reward: [A]."""
    if scores:
        return given.abs()
    return (summed_logprobs(given, inputs) - inputs["reference_logprobs"]).abs() / answer_lengths(inputs)


def _spread(trainer: Any, rows: list[int], given: Tensor, inputs: Batch) -> float:
    """By how much log-probabilities of these answers differ per token where each row is computed by itself: what the
    composition of a batch alone does to them, in the model's dtype.
    """
    together, lengths, at, most = summed_logprobs(given, inputs), answer_lengths(inputs), 0, 0.0
    blank = len(trainer.data.train)  # ranks that compute one model together make as many passes each
    for row in [*rows, *[blank] * (trainer.batch.micro_batch_size - len(rows))]:
        batch = collated(trainer.data.train, [row], trainer.data.collate, trainer.processing_class.pad_token_id)
        alone = {name: tensor.to(trainer.args.device) for name, tensor in batch.items()}
        with trainer.autocast_context():
            sums = summed_logprobs(given_to_objective(trainer.model, alone, trainer.objective), alone)
        size = len(sums)
        if size:
            apart = (sums - together[at : at + size]).abs() / lengths[at : at + size]
            most, at = max(most, float(apart.max())), at + size
    return most


def _where(trainer: Any, rows: list[int], differences: Tensor) -> str:
    """The place of the row with the largest difference."""
    if not len(differences):
        return "another rank"
    each = max(1, len(differences) // max(1, len(rows)))
    return str(trainer.data.train.wheres(rows[min(int(differences.argmax()) // each, len(rows) - 1)])[0])
