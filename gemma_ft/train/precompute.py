"""Log-probabilities of a reference over all rows, computed once before training and kept beside the data cache, where a
later run with the same rows and the same model finds them: for full fine-tuning, which changes its own base, and by
choice.

Letters: A answers.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from gemma_ft.data.pack.preferences import PreferenceExamples
from gemma_ft.errors import DiskError
from gemma_ft.system import environment
from gemma_ft.system.files import is_disk_full, write_cached
from gemma_ft.train.kl_baseline import HELD_OUT, mismatched
from gemma_ft.train.reference import answer_logprobs
from gemma_ft.train.sampler import Example, StepRows, collated, dealt

LAYOUT = 2  # of what is kept: nothing of another one is found
Fill = Callable[[int], None]


def precompute(trainer: Any, model: Any, identity: Sequence[Any], *, advance: Fill = lambda answers: None) -> None:
    """Give the trainer's examples, training and held-out ones, the log-probabilities of `model`, in the mode in which
    they will be compared; and its reference those of the mismatched answers of each step, where the objective asks.
    identity: what decides the values beside the rows, for JSON. `advance` hears how many answers were computed.

    All ranks call it. Raises: DiskError where they cannot be kept.
    """
    data, eval_size = trainer.data, trainer.args.per_device_eval_batch_size
    for examples, training in ((data.train, True), (data.held_out, False)):
        if examples is None:
            continue
        assert isinstance(examples, PreferenceExamples), "of rows that are streamed nothing is computed before"
        key = [*identity, "own", training, examples.fingerprint(), *([] if training else [eval_size])]
        rows, size = [examples[row] for row in range(len(examples))], None if training else eval_size
        examples.reference = _kept(trainer, key, lambda rows=rows, size=size, training=training: _values(  # type: ignore[misc]
            trainer, model, rows, size=size, training=training, advance=advance))  # fmt: skip
    if not trainer.objective.needs_baseline:
        return
    plan, seed, total = trainer.batch, trainer.args.seed, trainer.args.max_steps
    order = StepRows(len(data.train), plan, seed=seed)
    windows = {step: [data.train[row] for row in order.rows_of_step(step)] for step in range(total)}
    if data.held_out is not None:
        windows[HELD_OUT] = data.held_out[:]
    trained = data.train.fingerprint()
    for step, rows in windows.items():
        size = eval_size if step == HELD_OUT else plan.micro_batch_size
        key = [*identity, "mismatched", step, seed, plan.global_batch_size, size, trained]
        key += [data.held_out.fingerprint()] if step == HELD_OUT else []
        asked = mismatched(rows)
        trainer.reference.mismatched[step] = _kept(trainer, key, lambda asked=asked, step=step, size=size: _values(  # type: ignore[misc]
            trainer, model, asked, size=size, training=step != HELD_OUT, advance=advance))  # fmt: skip


def _kept(trainer: Any, key: Sequence[Any], compute: Callable[[], Any]) -> Any:
    """What was computed before under the same key, else now: float64 [A]. All ranks have the same."""
    named = hashlib.sha256(json.dumps([LAYOUT, *key]).encode()).hexdigest()
    path = environment.cache_folder() / "reference" / named[:2] / f"{named}.npy"
    world = trainer.world
    found = world.gather(_read(path) if world.main else None)[0]
    if found is None:
        found = compute()
        if world.main:
            _write(path, found)
    return found


@torch.no_grad()
def _values(
    trainer: Any, model: Any, rows: Sequence[Example], *, size: int | None, training: bool, advance: Fill
) -> Any:
    """Summed log-probabilities of the answers of some examples, one example after the other: float64 [A]. size: in
    batches of so many in their order, in which they will be compared, so that equal weights give equal bits; None: in
    micro-batches of equal lengths, for rows that are shuffled anyway.
    """
    world, pad_id, device = trainer.world, trainer.processing_class.pad_token_id, trainer.args.device
    was_training = model.training
    model.train(training)
    order: Sequence[int] = range(len(rows))
    if size is None:
        order, size = sorted(order, key=lambda row: -len(rows[row]["input_ids"])), trainer.batch.micro_batch_size
    own: list[tuple[int, list[float]]] = []
    for numbers in dealt(order, size, blank=len(rows), rank=world.rank, ranks=world.size):
        batch = collated(rows, numbers, trainer.data.collate, pad_id)
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        with trainer.autocast_context():
            values = iter(answer_logprobs(model, inputs).tolist())
        found = [(row, [next(values) for _ in rows[row]["sides"]]) for row in numbers if row < len(rows)]
        own += found
        advance(sum(len(of_row) for _, of_row in found))
    model.train(was_training)
    by_row = dict(one for of_rank in world.gather(own) for one in of_rank)
    return numpy.array([value for row in range(len(rows)) for value in by_row[row]], numpy.float64)


def _read(path: Path) -> Any:
    """What a file holds; None where there is none, or it is damaged."""
    try:
        raw = path.read_bytes()
        values, digest = raw[:-32], raw[-32:]
        return numpy.load(io.BytesIO(values), allow_pickle=False) if hashlib.sha256(values).digest() == digest else None
    except (OSError, ValueError, EOFError):
        return None


def _write(path: Path, values: Any) -> None:
    """It appears whole, with its hash behind it. Raises: DiskError."""
    buffer = io.BytesIO()
    numpy.save(buffer, values, allow_pickle=False)
    raw = buffer.getvalue()
    try:
        write_cached(path, raw, hashlib.sha256(raw).digest())
    except OSError as error:
        why = "no space left" if is_disk_full(error) else error.strerror or str(error)
        raise DiskError(f"{path.parent}: log-probabilities of the reference cannot be kept: {why}; free some, or set "
                        "GEMMA_FT_CACHE to another folder") from error  # fmt: skip
