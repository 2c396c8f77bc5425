"""A run that is built, from its scores before training to what is saved at its end: functions in the order of a run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from gemma_ft.build.start_adapter import start_of
from gemma_ft.data.encode.tokenizer_model import note_of_pieces
from gemma_ft.data.pack.collate import Collator
from gemma_ft.data.pack.collate_preferences import PreferenceCollator
from gemma_ft.errors import DataError, Stopped, UserError
from gemma_ft.evaluate.held_out import Score
from gemma_ft.evaluate.judge import judge_hash
from gemma_ft.plan.run import multiple_for
from gemma_ft.recipe.load import names_of
from gemma_ft.recipe.objectives import reference_kind
from gemma_ft.recipe.schema import Recipe
from gemma_ft.system import hardware
from gemma_ft.system.files import as_json, check_space, replace_text
from gemma_ft.system.observer import SILENT
from gemma_ft.train.activation_checkpointing import checkpoint_layers
from gemma_ft.train.checkpoint_state import bytes_of, load_state, load_weights
from gemma_ft.train.checkpoints import checkpoint_folder, checkpoints_of
from gemma_ft.train.evaluation import Scorer
from gemma_ft.train.held_out_objective import held_out_score
from gemma_ft.train.listener import listener_of, log_samples
from gemma_ft.train.objective_settings import objective_of
from gemma_ft.train.oom import fit_micro_batch, recover
from gemma_ft.train.progress import Progress
from gemma_ft.train.reference import Reference
from gemma_ft.train.result import base_fingerprint, round_weights, save_result
from gemma_ft.train.run_context import RunContext, TrainingLoop
from gemma_ft.train.run_log import RunLog
from gemma_ft.train.sampler import Collate, TrainingData
from gemma_ft.train.settings import TrainerOptions, training_arguments
from gemma_ft.train.start import judged, prepare_objective
from gemma_ft.train.summary import TrainedRun, summary_of
from gemma_ft.train.trackers import build_trackers
from gemma_ft.train.trainer import GemmaTrainer

# What a run is made of beside its recipe, and what is said of it when it changed.
INPUTS = {
    "data": "{names} gives other training rows",
    "held_out": "the held-out rows are others",
    "tokenizer": "the tokenizer is another{pieces}",
    "base": "the base weights are others",
    "judge": "the file of objective.judge is another",
    "start": "adapter.start is another adapter",
}
SAMPLES_KEPT = 10


def build_loop(context: RunContext) -> TrainingLoop:
    """The parts of a run, before its first step. All ranks call it. Raises: UserError where they read other rows."""
    recipe, data, world = context.recipe, context.data, context.world
    checkpoint_layers(context.model, context.checkpointing.run.checkpointed)
    rows = data.examples.fingerprint()
    if len(set(world.gather(rows))) > 1:
        raise UserError(f"{names_of(recipe.data.train)}: ranks read different rows; give every machine the same files")
    inputs = {
        "tokenizer": data.encoder.content.sha256,  # first: other ids make other rows
        "data": rows,
        "held_out": data.held_out.examples.fingerprint() if data.held_out else None,
        "base": base_fingerprint(context.source),
    }
    judge = judge_hash(getattr(recipe.objective, "judge", None))
    inputs |= {"judge": judge} if judge is not None else {}
    if recipe.adapter is not None and recipe.adapter.start is not None:
        inputs["start"] = start_of(recipe.adapter.start).hash
    progress = Progress(extra={"inputs": inputs, "total": context.total})
    if data.streamed:
        data.streamed.waiting = lambda: _stop_waiting(context)
    trainer = _build_trainer(context, progress)
    scorer = Scorer(
        recipe.eval,
        data,
        context.canary,
        context.model,
        context.tokenizer,
        max_seq_len=recipe.data.max_seq_len,
        progress=progress,
        autocast=trainer.autocast_context,
        world=world,
        answers=not trainer.objective.scores,
    )
    loop = TrainingLoop(context, progress, RunLog(context.run, world.main, context.observer.say), trainer, scorer)
    trainer.listener = listener_of(loop)
    return loop


def _build_trainer(context: RunContext, progress: Progress) -> GemmaTrainer:
    recipe, data = context.recipe, context.data
    held_out = data.held_out.examples if data.held_out else None
    start = recipe.adapter.start if recipe.adapter is not None else None
    multiple = multiple_for(context.checkpointing.run.device, packing=recipe.data.packing)
    return GemmaTrainer(
        context.model,
        training_arguments(
            recipe, context.run.checkpoints, context.total, context.batch, context.world, evaluates=held_out is not None
        ),
        data=TrainingData(data.examples, held_out, collator_of(recipe, data.encoder.control.pad, multiple)),
        batch=context.batch,
        objective=objective_of(recipe, data),
        reference=Reference(reference_kind(recipe.objective, recipe.strategy, start)),
        options=TrainerOptions.of(recipe),
        tokenizer=context.tokenizer,
        world=context.world,
        stop=context.stop,
        source=context.source,
        progress=progress,
        checkpointing=context.checkpointing,
    )


def collator_of(recipe: Recipe, pad_id: int, multiple: int) -> Collate:
    """What makes a batch of a recipe's examples."""
    if recipe.objective.rows == "answers":
        return Collator(pad_id, multiple=multiple)
    budget = recipe.data.max_seq_len if recipe.data.packing else None
    return PreferenceCollator(pad_id, multiple=multiple, budget=budget)


def take_up(loop: TrainingLoop, checkpoint: Path, allow_drift: Sequence[str] = ()) -> None:
    """Go on from a checkpoint: its progress becomes this run's.

    Raises: UserError when rows, base or tokenizer are not those of the checkpoint, and `allow_drift` does not name
    them.
    """
    context, progress = loop.context, loop.progress
    now = progress.extra
    vars(progress).update(load_state(checkpoint))
    before = progress.extra
    for name, value in now["inputs"].items():
        if before["inputs"].get(name, value) == value:
            continue
        pieces = note_of_pieces(context.tokenizer)
        what = INPUTS[name].format(names=names_of(context.recipe.data.train), pieces=pieces)
        if name not in allow_drift:
            raise UserError(
                f"{context.run.root}: cannot resume: {what} than before; restore it, start a new output_dir, or give "
                f"--allow-drift {name}"
            )
        context.observer.say(f"  drift: {what}")
    before["inputs"] = now["inputs"]
    if context.data.streamed and before.get("stream"):
        context.data.streamed.go_on(before["stream"])
    context.observer.say(f"  resuming   after step {progress.step}, from {checkpoint}")
    if before["total"] != context.total:
        context.observer.say(f"  note: the learning rate now runs over {context.total} steps, was {before['total']}")
        before["total"] = context.total


def go(loop: TrainingLoop, checkpoint: Path | None) -> int:
    """Score, train, score again, save; the order of a run. Returns the exit code 0."""
    context, progress, log = loop.context, loop.progress, loop.log
    recipe, run, world = context.recipe, context.run, context.world
    with world.phase("the start"):
        if world.main:
            _clear_the_way(loop)
    try:
        prepare_objective(loop, begins=checkpoint is None)
        if checkpoint is None:
            _score_before(loop)
        _train(loop, checkpoint)
        if recipe.strategy == "full":  # what is scored is what is saved
            round_weights(context.model, hardware.dtype_by_name(recipe.train.precision), world)
        after = _score(loop)
        compared = loop.scorer.compared(after.loss)
        won = judged(loop, after.answers)
        log.scores(progress.step, {**after.figures(), **compared})
        log_samples(loop, progress.step, after.answers)
        with world.phase("the result's save"):
            encoder = context.data.encoder
            result = save_result(run, recipe, context.model, context.tokenizer, encoder, context.source, world)
        questions = loop.scorer.questions
        summary = summary_of(
            progress, after=after, compared=compared, questions=questions, result=result.name, data=context.data
        )
        summary |= {"win_rate": won} if won is not None else {}
        with world.phase("the summary"):
            if world.main:
                replace_text(run.summary, as_json(summary))
    finally:
        log.close()
    if world.main:
        context.finish(TrainedRun(run, summary, recipe.objective.rows))
    return 0


def _clear_the_way(loop: TrainingLoop) -> None:
    """Before anything new is written: is there space, and what was measured of the weights before is not of these."""
    context, step = loop.context, loop.progress.step
    recipe, run = context.recipe, context.run
    wanted = recipe.checkpoint
    kept = min(wanted.keep + wanted.keep_best, context.total) + 1  # and the one that is being written
    missing = max(1, kept - len(checkpoints_of(run.checkpoints)))
    check_space(run.root, missing * bytes_of(context.model), go_on="start again")
    run.cut_logs(step)
    for said_at_the_end in (run.summary, run.report, run.eval_results, run.certificate):
        said_at_the_end.unlink(missing_ok=True)
    loop.log.trackers += build_trackers(recipe, run.root, context.observer.say, done=step)


def _score(loop: TrainingLoop) -> Score:
    trainer, observer = loop.trainer, loop.context.observer
    count = trainer.held_out_count
    job = observer.job("held-out batches", count) if count else contextlib.nullcontext(SILENT)
    with job as counted:
        score = held_out_score(trainer, advance=counted.advance)
    return loop.scorer.score(score, observer)


def _score_before(loop: TrainingLoop) -> None:
    begun = time.monotonic()
    score = _score(loop)
    loop.scoring_seconds = time.monotonic() - begun
    loop.scorer.remember_base()
    kept = len(score.answers) if loop.judge is not None else max(SAMPLES_KEPT, loop.context.recipe.eval.samples)
    loop.progress.extra["before"] = {**score.figures(), "answers": score.answers[:kept]}
    loop.log.scores(0, score.figures())
    log_samples(loop, 0, score.answers)


def _train(loop: TrainingLoop, checkpoint: Path | None) -> None:
    context, progress = loop.context, loop.progress
    with context.observer.job("train", context.total, done=progress.step) as loop.job:
        if checkpoint is not None and progress.step >= context.total:
            load_weights(checkpoint, context.model)  # Trainer would take one step more
        else:
            fit(loop)
            with context.stop.waiting():
                _train_on(loop, checkpoint)
    if loop.trainer.stopped:
        error = Stopped(
            f"stopped by {context.stop.reason or 'another rank'} after step {progress.step}; --resume goes on "
            "from its checkpoint"
        )
        error.told = not context.world.main
        raise error


def fit(loop: TrainingLoop) -> None:
    """On GPUs that hold the whole model, find out before the first step whether its longest batch fits as well."""
    context, trainer = loop.context, loop.trainer
    if context.world.layout == "fsdp2" or hardware.default_device().type != "cuda":
        return
    with context.world.phase("the longest batch"):
        trainer.batch = fit_micro_batch(trainer)
    if trainer.batch != context.batch or trainer.checkpointing is not context.checkpointing:
        _say_smaller(loop, f"micro_batch_size {context.batch.micro_batch_size} does not fit")


def _train_on(loop: TrainingLoop, checkpoint: Path | None) -> None:
    """Train to the end; where memory runs out, go on after the last whole step with smaller micro-batches."""
    trainer = loop.trainer
    while True:
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            return
        except torch.OutOfMemoryError as error:
            trainer.batch = recover(trainer, error)
        except (DataError, Stopped):  # over rows that are streamed: what was trained before them is kept
            trainer.keep_step()
            raise
        step = loop.progress.step
        checkpoint = checkpoint_folder(loop.context.run.checkpoints, step) if step else None
        _say_smaller(loop, f"ran out in step {step + 1}")


def _say_smaller(loop: TrainingLoop, what: str) -> None:
    batch, all_layers = loop.trainer.batch, loop.trainer.checkpointing is not loop.context.checkpointing
    more = "all layers recomputing their activations, " if all_layers else ""
    loop.context.observer.say(
        f"  memory     {what}; going on with {more}micro_batch_size {batch.micro_batch_size} and "
        f"{batch.accumulation_steps} accumulations: the steps stay the same"
    )


def _stop_waiting(context: RunContext) -> None:
    """A source that gives nothing is not waited for when the run was asked to stop. (Of several ranks each waits: one
    alone cannot save. They leave at the second signal.)
    """
    if context.world.size == 1 and context.stop.asked():
        raise Stopped(f"stopped by {context.stop.reason} while rows were awaited; --resume goes on")
