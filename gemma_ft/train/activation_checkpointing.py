"""Layers that recompute their activations in backward: as many as memory asks for, the first ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from gemma_ft.adapters.trainable_tokens import native_of
from gemma_ft.kernels.backend import choice_of
from gemma_ft.plan import parts
from gemma_ft.plan.fit import layers_to_checkpoint, recomputing, smallest_change
from gemma_ft.plan.phases import train_phase
from gemma_ft.plan.run import Ranks, Run, run_of, without_flex
from gemma_ft.recipe.batch_plan import BatchPlan
from gemma_ft.recipe.schema import Recipe
from gemma_ft.system import environment, hardware
from gemma_ft.system.units import byte_size
from gemma_ft.train.distributed import World

HEADROOM = 0.9  # of the memory that is free; the rest is left to what no plan knows of


def checkpoint_layers(model: Any, count: int) -> None:
    """Have the first `count` layers of a model keep their input alone in training, and compute the rest again in
    backward; the others keep what they need. No number changes by it.
    """
    for index, layer in enumerate(native_of(model).model.layers):
        layer.gradient_checkpointing = index < count
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


@dataclass(frozen=True)
class Checkpointing:
    """How many layers of how many, and what is planned of the memory that is there; the same on all ranks."""

    run: Run
    room: int  # bytes of one rank's device that a run may take
    auto: bool

    @property
    def planned(self) -> int:
        """Bytes of the device that a step is planned to take."""
        return train_phase(self.run).total

    def describe(self) -> str:
        """The choice in one line."""
        why = "" if self.auto else ", as the recipe says"
        planned, room = (byte_size(size, digits=".1f") for size in (self.planned, self.room))
        return f"{recomputing(self.run)}{why}; {planned} planned of {room}"

    def of_all(self) -> Checkpointing | None:
        """The same with all layers, where the choice is ours and not all are; None where there is no more to take."""
        layers = self.run.shape.layers
        if not self.auto or self.run.checkpointed == layers:
            return None
        return replace(self, run=self.run.changed(checkpointed=layers))

    def cure(self, micro_batch_size: int) -> str:
        """Settings to give when memory ran out over so many sequences at a time, although it was planned to fit: what
        the planner changes to have activations and head take a tenth less; "" where it knows nothing.
        """
        training = self.run.changed(micro_batch_size=micro_batch_size, eval_rows=1, answers=False)
        phase = train_phase(training)
        less = (phase.device["activations"] + phase.device["head"]) // 10
        found = smallest_change(training, phase.total - less, auto=False)
        return " ".join(found.overrides) if found is not None else ""


def choose_checkpointing(recipe: Recipe, batch: BatchPlan, *, tokens: int, world: World) -> Checkpointing:
    """The layers to checkpoint: what the recipe says, or where it says auto, the fewest with which a step of `batch`
    and of sequences of `tokens` fits into what this process holds and what is free, on every rank. All ranks call it.
    """
    device = hardware.default_device()
    run = run_of(
        recipe,
        batch=batch,
        tokens=tokens,
        device="cuda" if device.type == "cuda" else "cpu",
        ranks=Ranks(world.size, world.layout, world.reshard_after_forward, world.offload),
    )
    run = _as_it_will_run(run, device)
    held, free = hardware.memory_bytes()
    if run.device == "cuda":
        held += parts.overhead(run)  # the context, which torch does not count
        sharing = 1
    else:
        sharing = environment.ranks_on_this_machine(world.size)
    room = held + int(HEADROOM * free / sharing)
    auto = recipe.train.gradient_checkpointing == "auto"
    count = layers_to_checkpoint(run, room) if auto else run.checkpointed
    room, count = min(world.gather(room)), max(world.gather(count))
    return Checkpointing(run.changed(checkpointed=count), room, auto)


def _as_it_will_run(run: Run, device: torch.device) -> Run:
    """`run` without the fast paths that turned out not to be there."""
    dtype = hardware.dtype_by_name(run.precision)
    if run.device == "cuda":
        device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device

    def runs(operation: str) -> str:
        return choice_of(operation, device, dtype, head_dim=run.shape.head_dim).implementation.name

    if run.own_kernels and runs("rms_norm") == "torch":  # there is a compiler, but it may not have built the operations
        run = run.changed(own_kernels=False)
    if run.attention == "flex" and runs("attention") != "flex":
        run = run.changed(attention=without_flex(softcap=run.shape.attn_softcap))
    return run
