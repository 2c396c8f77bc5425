"""What makes a run fit: how many layers to checkpoint, and the smallest change of its recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

from gemma_ft.plan.phases import Phase, phases, train_phase
from gemma_ft.plan.run import Run

SHORTEST = 256  # tokens of a sequence below which none is cut to fit


def layers_to_checkpoint(run: Run, room: int) -> int:
    """The fewest first layers whose activations must be recomputed for a training step to take no more than `room`
    bytes of the device; all of them where even that does not fit.
    """
    few, many = 0, run.shape.layers
    while few < many:  # less memory with each layer more
        middle = (few + many) // 2
        if train_phase(run.changed(checkpointed=middle)).total <= room:
            many = middle
        else:
            few = middle + 1
    return many


def on_device(run: Run) -> list[Phase]:
    """The phases of a run's own process on its device; a merge is a command of its own."""
    return [phase for phase in phases(run) if phase.name != "merge"]


def peak(run: Run) -> int:
    """The most bytes that a run takes of one device at any time."""
    return max(phase.total for phase in on_device(run))


@dataclass(frozen=True)
class Change:
    """Settings to give on the command line, and the run with them."""

    overrides: tuple[str, ...]
    run: Run


def fitted(run: Run, room: int, *, auto: bool) -> Run:
    """The run with as many layers checkpointed as `room` asks for, where the choice is the planner's (`auto`)."""
    return run.changed(checkpointed=layers_to_checkpoint(run, room)) if auto else run


def smallest_change(run: Run, room: int, *, auto: bool) -> Change | None:
    """The smallest change with which every phase of a run fits into `room` bytes; an empty one where it fits as it is,
    None where nothing that a recipe can say makes it fit.

    Changes that leave the result as it is come first: checkpointing, smaller micro-batches, fewer rows of an evaluation
    at a time; then weights in 4 bits, then shorter sequences. Among those one setting is less than two. `auto`:
    gradient_checkpointing is, so that layers are checkpointed as needed.
    """
    run = fitted(run, room, auto=auto)
    if peak(run) <= room:
        return Change((), run)
    harmless, others = _harmless(run, auto), _others(run)
    for ladders in (harmless, [*harmless, *others]):
        for override, change in (step for ladder in ladders for step in ladder):
            one = fitted(change(run), room, auto=auto or override == AUTO)
            if peak(one) <= room:
                return Change((override,), one)
        if (found := _together(run, room, ladders, auto=auto)) is not None:
            return found
    return None


Step = tuple[str, Callable[[Run], Run]]
Ladder = list[Step]  # one setting, from the value that is nearest to the recipe's to the one that saves most
AUTO = "train.gradient_checkpointing=auto"


def _together(run: Run, room: int, ladders: list[Ladder], *, auto: bool) -> Change | None:
    """Each setting at what saves most; then each is taken back step by step as far as it still fits, the one that costs
    most first.
    """
    taken = [len(ladder) for ladder in ladders]

    def change() -> Change:
        steps = [ladder[count - 1] for ladder, count in zip(ladders, taken, strict=True) if count]
        said = tuple(override for override, _ in steps)
        changed = reduce(lambda one, step: step[1](one), steps, run)
        return Change(said, fitted(changed, room, auto=auto or AUTO in said))

    if peak(change().run) > room:
        return None
    for place in reversed(range(len(ladders))):
        while taken[place]:
            taken[place] -= 1
            if peak(change().run) > room:
                taken[place] += 1
                break
    return change()


def _harmless(run: Run, auto: bool) -> list[Ladder]:
    """Settings that change memory and not the result."""
    sequences = run.micro_batch_size * run.accumulation_steps
    smaller = [size for size in range(run.micro_batch_size - 1, 0, -1) if sequences % size == 0]
    scored = dict.fromkeys(count for count in (run.eval_rows // 2, run.eval_rows // 4, 1) if 1 <= count < run.eval_rows)
    return [
        [] if auto or run.checkpointed == run.shape.layers else [(AUTO, lambda one: one)],
        [(f"train.micro_batch_size={size}", _micro_batches(size)) for size in smaller],
        [(f"eval.batch_size={count}", _changed(eval_rows=count)) for count in scored],
    ]


def _others(run: Run) -> list[Ladder]:
    """Settings that change what is trained."""
    lengths = []
    length = run.tokens // 2
    while length >= SHORTEST:
        lengths.append(length)
        length //= 2
    override = "quantize=nf4" if run.quantize == "int8" else "strategy=qlora"
    four_bits = [(override, _changed(strategy="qlora", quantize="nf4"))]
    shorter = [(f"data.max_seq_len={length}", _changed(tokens=length)) for length in lengths]
    return [[] if run.full or run.quantize == "nf4" else four_bits, shorter]


def _changed(**fields: Any) -> Callable[[Run], Run]:
    return lambda run: run.changed(**fields)


def _micro_batches(size: int) -> Callable[[Run], Run]:
    return lambda run: run.changed(
        micro_batch_size=size, accumulation_steps=run.micro_batch_size * run.accumulation_steps // size
    )


def recomputing(run: Run) -> str:
    """How many layers recompute their activations, in words."""
    count, layers = run.checkpointed, run.shape.layers
    if not count:
        return "no layer recomputes its activations"
    which = f"all {layers}" if count == layers else f"the first {count} of {layers}"
    return f"{which} layers recompute their activations"
