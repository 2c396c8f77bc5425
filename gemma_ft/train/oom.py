"""Whether the longest micro-batch fits into a GPU's memory, found out before the first step, and what does if not, then
or later.
"""

from __future__ import annotations

from typing import Any

import torch

from gemma_ft.data.pack.examples import Example
from gemma_ft.errors import UserError
from gemma_ft.recipe.batch_plan import BatchPlan
from gemma_ft.train.activation_checkpointing import checkpoint_layers
from gemma_ft.train.micro_batch import divisors_of, micro_batch_loss, prepared

CURES = "set train.gradient_checkpointing=true, lower data.max_seq_len, or --launch fsdp2"


def cures_of(trainer: Any, micro_batch_size: int) -> str:
    """What to do where memory is too small: the planner's change, where it has one, or other ways."""
    cure = trainer.checkpointing.cure(micro_batch_size) if trainer.checkpointing is not None else ""
    return f"set {cure}, or --launch fsdp2" if cure else CURES


def fit_micro_batch(trainer: Any) -> BatchPlan:
    """Compute the longest micro-batch once, forward and backward; where memory runs out on any rank, first checkpoint
    all layers, where the recipe leaves that to us, then halve it until it fits; accumulation grows by as much, so that
    each step trains the same rows over the same count of tokens. Returns the plan that fits.

    The model is not wrapped for several ranks yet: none waits for another inside. Raises: UserError when a single row
    does not fit.
    """
    batch: BatchPlan = trainer.batch
    longest = trainer.data.train.longest(batch.micro_batch_size)
    while trainer.world.any(not _fits(trainer, longest[: batch.micro_batch_size])):
        if recompute_all(trainer):
            continue
        if batch.micro_batch_size == 1:
            tokens = len(longest[0]["input_ids"])
            raise UserError(f"a single row of {tokens:,} tokens does not fit into GPU memory; {cures_of(trainer, 1)}")
        batch = batch.smaller()
    return batch


def recompute_all(trainer: Any) -> bool:
    """Checkpoint all layers, where that is ours to choose and not all are; returns whether any was added. It changes no
    number, and comes before smaller micro-batches.
    """
    more = trainer.checkpointing.of_all() if trainer.checkpointing is not None else None
    if more is None:
        return False
    trainer.checkpointing = more
    checkpoint_layers(trainer.model, more.run.checkpointed)
    return True


def recover(trainer: Any, error: torch.OutOfMemoryError) -> BatchPlan:
    """After memory ran out within a step: gradients are dropped, a checkpoint is made of the last whole step, and all
    layers are checkpointed or the micro-batch is halved. The trainer can then train on from that checkpoint, with the
    plan that is returned.

    Raises: `error` where weights may have changed already (the optimizer ran out), UserError where nothing is left to
    halve, or other ranks are in the same step: they would wait for this one.
    """
    step, size = trainer.state.global_step, trainer.batch.micro_batch_size
    if not trainer.computing:
        raise error
    more = trainer.world.size == 1 and recompute_all(trainer)
    if trainer.world.size > 1 or (size == 1 and not more):
        cures = cures_of(trainer, size)
        cure = cures if size == 1 else f"--resume train.micro_batch_size={size // 2} goes on, or {cures}"
        raise UserError(f"out of GPU memory in step {step + 1}, micro-batches of {size} rows; {cure}") from error
    trainer.model.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trainer.keep_step()
    if step and trainer.saved_step != step:  # no space, which was told
        raise UserError(
            f"out of GPU memory in step {step + 1}, and no space for a checkpoint to go on from; free some, then "
            f"--resume train.micro_batch_size={max(size // 2, 1)}"
        ) from error
    batch: BatchPlan = trainer.batch
    return batch if more else batch.smaller()


def _fits(trainer: Any, rows: list[Example]) -> bool:
    """Whether this rank has memory for these rows; gradients are gone afterwards."""
    try:
        _compute(trainer, rows)
    except torch.OutOfMemoryError:
        return False
    finally:
        trainer.model.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return True


def _compute(trainer: Any, rows: list[Example]) -> None:
    """Forward and backward over some rows, beside what the first step takes as well: two moments of each trained
    weight, and DDP's copy of the gradients.
    """
    model = trainer.model
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    reserve = torch.empty((2 + (trainer.world.size > 1)) * trained, dtype=torch.uint8, device=trainer.args.device)
    model.train()
    batch, device, autocast = trainer.data.collate(rows), trainer.args.device, trainer.autocast_context
    if trainer.objective.needs_baseline:
        batch["kl_baseline"] = torch.zeros((), dtype=torch.float64)
    inputs = prepared(model, batch, trainer.objective, trainer.reference, device, autocast)
    divisors = divisors_of(trainer.objective, [batch], list).to(device)
    with autocast():
        found = micro_batch_loss(model, inputs, trainer.objective, divisors)
    found.loss.backward()
    del reserve
