"""A run from recipe to tuned Gemma: what is checked, built and locked before it trains."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gemma_ft.build.data import build_data
from gemma_ft.build.inputs import build_tokenizer, check_apart, inputs_of
from gemma_ft.build.model import build_model
from gemma_ft.errors import RankError, Stopped, UserError
from gemma_ft.evaluate.forgetting import build_forgetting_set
from gemma_ft.recipe.batch_plan import batch_plan
from gemma_ft.recipe.load import LoadedRecipe
from gemma_ft.system.observer import SILENT, Observer
from gemma_ft.train.activation_checkpointing import choose_checkpointing
from gemma_ft.train.checkpoints import newest_valid
from gemma_ft.train.distributed import World, join_world, lost_a_rank
from gemma_ft.train.loop import build_loop, go, take_up
from gemma_ft.train.optimizers import check_optimizer
from gemma_ft.train.run_context import Finish, RunContext
from gemma_ft.train.run_dir import RunDir
from gemma_ft.train.settings import total_steps
from gemma_ft.train.signals import StopNow, StopRequest
from gemma_ft.train.start import call_judge, check_reference
from gemma_ft.train.startup import startup_lines


def train_recipe(
    loaded: LoadedRecipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop_file: Path | None = None,
    allow_drift: Sequence[str] = (),
    observer: Observer = SILENT,
    finish: Finish = lambda trained: None,
) -> int:
    """Train what a recipe says and write everything under its output_dir; returns the exit code 0.

    `stop_file`: a path whose appearance stops the run at its next step, as a signal does. `allow_drift`: keys of the
    recipe, or data, base, tokenizer, that a resumed run may find changed. `finish` is called on the main rank when all
    else is done, while signals are still taken as those of a run.
    Raises: UserError and its children, one clear line each. Until the run is built, nothing in output_dir is touched.
    """
    stop, mode = StopRequest(stop_file), Mode(resume=resume, overwrite=overwrite, allow_drift=tuple(allow_drift))
    with stop.listening(), observer.heard(partial(stop.ask, "a closed output")):
        try:
            return _joined(loaded, stop, mode, observer, finish)
        except UserError:
            raise
        except (Exception, StopNow) as error:
            if not stop.signalled:
                raise
            # what a signal raised inside a library may also come out of it as a fault of its own
            raise Stopped(f"stopped by {stop.reason}; nothing was lost, --resume goes on") from error


@dataclass(frozen=True)
class Mode:
    """How a run meets what lies in its directory."""

    resume: bool
    overwrite: bool
    allow_drift: tuple[str, ...]


def _joined(loaded: LoadedRecipe, stop: StopRequest, mode: Mode, observer: Observer, finish: Finish) -> int:
    world = join_world(observer.warn)
    try:
        return _train(loaded, world, stop, mode, observer if world.main else SILENT, finish)
    except RuntimeError as error:
        if world.size == 1 or not lost_a_rank(error):
            raise
        if stop.reason is not None:  # all were asked to stop, and another was where it could leave at once
            raise Stopped(f"stopped by {stop.reason} in {world.phase_name}; --resume goes on") from error
        raise RankError(f"rank {world.rank}: another rank is gone, in {world.phase_name}; --resume goes on") from error
    finally:
        world.close()


def _train(
    loaded: LoadedRecipe, world: World, stop: StopRequest, mode: Mode, observer: Observer, finish: Finish
) -> int:
    recipe = loaded.recipe
    run = RunDir(Path(recipe.output_dir))
    observer.say(f"gemma-ft train {loaded.path} -> {run.root}")
    for note in loaded.notes:
        observer.say(f"  note: {note}")
    with world.phase("the checks"):
        batch = batch_plan(recipe, world.size)
        check_optimizer(recipe.train, world)
        if world.main:
            check_apart(recipe, run.root, named=f"output_dir: {run.root}", cure="choose another")
            run.check(resume=mode.resume, overwrite=mode.overwrite, inputs=inputs_of(recipe))
            for told in run.check_recipe(recipe, mode.allow_drift) if mode.resume else ():
                observer.say(f"  drift: {told}")
    with world.phase("the data"), observer.job("documents read") as job:
        tokenizer = build_tokenizer(recipe, run.trained_tokenizer() if mode.resume else None)
        check_reference(recipe, tokenizer)
        data = build_data(recipe, tokenizer, job.advance) if world.writes else None
    with world.phase("the data, read by the other ranks"):  # out of the cache, into which one rank of a machine writes
        data = data or build_data(recipe, tokenizer)
        canary = None
        if recipe.eval.canary is not None:
            canary = build_forgetting_set(recipe.eval.canary, data.encoder, batch_size=recipe.eval.batch_size)
    total = total_steps(recipe, len(data.examples))
    finished = world.gather(run.steps_finished() if mode.resume else None)[0]
    if finished is not None and finished >= total:
        observer.say(f"{run.root}: already finished, {finished} steps; nothing to do")
        return 0
    with contextlib.ExitStack() as held:
        with world.phase("the lock"):
            if world.main:
                held.enter_context(run.locked())
        with world.phase("the model"):
            model, source = build_model(recipe, tokenizer, empty=world.layout == "fsdp2")
        with world.phase("the plan"):
            longest = data.train.examples.longest_sequence if data.streamed is None else recipe.data.max_seq_len
            chosen = choose_checkpointing(recipe, batch, tokens=longest, world=world)
        for label, text in startup_lines(recipe, data, canary, model, source, total, batch, world, chosen):
            observer.say(f"  {label:<10} {text}")
        context = RunContext(
            recipe, run, observer, finish, tokenizer, data, canary, model, source, total, batch, world, stop, chosen
        )
        loop = build_loop(context)
        with world.phase("the search for a checkpoint"):  # by one rank: it may set damaged ones aside
            newest = newest_valid(run.checkpoints, observer.say) if mode.resume and world.main else None
        checkpoint: Path | None = world.gather(newest)[0]
        with world.phase("the checkpoint"):
            if checkpoint is not None:
                take_up(loop, checkpoint, mode.allow_drift)
            call_judge(loop)
            if world.main:
                if mode.overwrite:
                    run.clear()
                run.write_recipe(recipe)
                run.write_bad_rows(data.skipped, add=data.streamed is not None and checkpoint is not None)
                if data.streamed is not None:
                    data.streamed.on_bad_rows = lambda bad: run.write_bad_rows(bad.rows, add=True)
        return go(loop, checkpoint)
