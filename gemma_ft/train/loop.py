"""The course of a run that is built: score, train, score again, save."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gemma_ft.build.data import BuiltData
from gemma_ft.build.located import Source
from gemma_ft.data.encode.tokenizer_model import note_of_pieces
from gemma_ft.data.pack.collate import Collator
from gemma_ft.errors import DataError, NonFiniteError, Stopped, UserError
from gemma_ft.evaluate.forgetting import Canary
from gemma_ft.evaluate.held_out import Score
from gemma_ft.evaluate.samples import sample_lines
from gemma_ft.plan.run import multiple_for
from gemma_ft.recipe.batch_plan import micro_batch
from gemma_ft.recipe.schema import Recipe, names_of
from gemma_ft.system import hardware
from gemma_ft.system.files import as_json, check_space, replace_text
from gemma_ft.train.activation_checkpointing import Checkpointing, checkpoint_layers
from gemma_ft.train.checkpoint_state import bytes_of, load_state, load_weights
from gemma_ft.train.checkpoints import checkpoint_folder, checkpoints_of
from gemma_ft.train.display import Display, show_summary
from gemma_ft.train.distributed import World
from gemma_ft.train.evaluation import Figures, Scorer
from gemma_ft.train.oom import fit_micro_batch, recover
from gemma_ft.train.result import base_fingerprint, round_weights, save_result
from gemma_ft.train.run_dir import RunDir
from gemma_ft.train.run_log import RunLog
from gemma_ft.train.settings import training_arguments
from gemma_ft.train.signals import StopRequest
from gemma_ft.train.summary import summary_of
from gemma_ft.train.trackers import build_trackers
from gemma_ft.train.trainer import GemmaTrainer, Progress

# What a run is made of beside its recipe, and what is said of it when it changed.
INPUTS = {
    "data": "{names} gives other training rows",
    "held_out": "the held-out rows are others",
    "tokenizer": "the tokenizer is another{pieces}",
    "base": "the base weights are others",
}
SAMPLES_KEPT = 10
ROWS_NAMED = 4
SKIPPED_AT_MOST = 3  # updates in a row that were not finite; then the run ends


@dataclass
class Course:
    """One run with everything it needs built, on one of its ranks."""

    recipe: Recipe
    run: RunDir
    display: Display
    tokenizer: PreTrainedTokenizerBase
    data: BuiltData
    canary: Canary | None
    model: Any
    source: Source | None
    total: int
    world: World
    stop: StopRequest
    checkpointing: Checkpointing

    def __post_init__(self) -> None:
        checkpoint_layers(self.model, self.checkpointing.run.checkpointed)
        rows = self.data.examples.fingerprint()
        if len(set(self.world.gather(rows))) > 1:
            raise UserError(
                f"{names_of(self.recipe.data.train)}: ranks read different rows; give every machine the same files"
            )
        held_out = self.data.held_out.examples.fingerprint() if self.data.held_out else None
        inputs = {
            "tokenizer": self.data.encoder.content.sha256,  # first: other ids make other rows
            "data": rows,
            "held_out": held_out,
            "base": base_fingerprint(self.source),
        }
        self.progress = Progress(extra={"inputs": inputs, "total": self.total})
        if self.data.streamed:
            self.data.streamed.waiting = self._while_waiting
        self.log = RunLog(self.run, self.world.main, self.display.say)
        self.trainer = self._trainer()
        self.trainer.checkpointing = self.checkpointing
        self.scorer = Scorer(
            self.recipe.eval,
            self.data,
            self.canary,
            self.model,
            self.tokenizer,
            max_seq_len=self.recipe.data.max_seq_len,
            progress=self.progress,
            autocast=self.trainer.compute_loss_context_manager,
            world=self.world,
        )

    def take_up(self, checkpoint: Path, allow_drift: Sequence[str] = ()) -> None:
        """Go on from a checkpoint: its progress becomes this run's.

        Raises: UserError when rows, base or tokenizer are not those of the checkpoint, and `allow_drift` does not name
        them.
        """
        now = self.progress.extra
        vars(self.progress).update(load_state(checkpoint))
        before = self.progress.extra
        for name, value in now["inputs"].items():
            if before["inputs"].get(name, value) == value:
                continue
            what = INPUTS[name].format(names=names_of(self.recipe.data.train), pieces=note_of_pieces(self.tokenizer))
            if name not in allow_drift:
                raise UserError(
                    f"{self.run.root}: cannot resume: {what} than before; restore it, start a new output_dir, or give "
                    f"--allow-drift {name}"
                )
            self.display.say(f"  drift: {what}")
        before["inputs"] = now["inputs"]
        if self.data.streamed and before.get("stream"):
            self.data.streamed.go_on(before["stream"])
        self.display.say(f"  resuming   after step {self.progress.step}, from {checkpoint}")
        if before["total"] != self.total:
            self.display.say(f"  note: the learning rate now runs over {self.total} steps, was {before['total']}")
            before["total"] = self.total

    def go(self, checkpoint: Path | None) -> int:
        """Score, train, score again, save; the order of a run."""
        with self.world.phase("the start"):
            if self.world.main:
                wanted = self.recipe.checkpoint
                kept = min(wanted.keep + wanted.keep_best, self.total) + 1  # and the one that is being written
                missing = max(1, kept - len(checkpoints_of(self.run.checkpoints)))
                check_space(self.run.root, missing * bytes_of(self.model), go_on="start again")
                self._clean_up()
        try:
            if checkpoint is None:
                self._score_before()
            self._train(checkpoint)
            if self.recipe.strategy == "full":  # what is scored is what is saved
                round_weights(self.model, hardware.dtype_by_name(self.recipe.train.precision), self.world)
            after = self._score()
            compared = self.scorer.compared(after.loss)
            self.log.scores(self.progress.step, {**after.figures(), **compared})
            self._sample(self.progress.step, after.answers)
            result = self._save()
            summary = summary_of(
                self.progress,
                after=after,
                compared=compared,
                questions=self.scorer.questions,
                result=result.name,
                data=self.data,
            )
            with self.world.phase("the summary"):
                if self.world.main:
                    replace_text(self.run.summary, as_json(summary))
        finally:
            self.log.close()
        if self.world.main:
            show_summary(self.display.console, summary, self.run, self._report())
        return 0

    def _clean_up(self) -> None:
        """Before anything new is written: what was measured of the weights before is not of these."""
        self.run.cut_logs(self.progress.step)
        for said_at_the_end in (self.run.summary, self.run.report, self.run.eval_results, self.run.certificate):
            said_at_the_end.unlink(missing_ok=True)
        self.log.trackers += build_trackers(self.recipe, self.run.root, self.display.say, done=self.progress.step)

    def _save(self) -> Path:
        with self.world.phase("the result's save"):
            return save_result(
                self.run, self.recipe, self.model, self.tokenizer, self.data.encoder, self.source, self.world
            )

    def _score(self) -> Score:
        return self.scorer.score(self.trainer.get_eval_dataloader() if self.data.held_out else ())

    def _score_before(self) -> None:
        score = self._score()
        self.scorer.remember_base()
        kept = max(SAMPLES_KEPT, self.recipe.eval.samples)
        self.progress.extra["before"] = {**score.figures(), "answers": score.answers[:kept]}
        self.log.scores(0, score.figures())
        self._sample(0, score.answers)

    def _report(self) -> Path | None:
        """The run's page; one line instead of it when it cannot be made, for the run itself is whole."""
        try:
            from gemma_ft.evaluate.report.page import write_report

            return write_report(self.run.root, self.run.report)
        except Exception as error:
            self.display.say(f"report.html could not be made ({type(error).__name__}: {error}); the run is complete")
            return None

    def _train(self, checkpoint: Path | None) -> None:
        self.display.start(self.total, self.progress.step)
        try:
            if checkpoint is not None and self.progress.step >= self.total:
                load_weights(checkpoint, self.model)  # Trainer would take one step more
            else:
                self._fit()
                with self.stop.waiting():
                    self._train_on(checkpoint)
        finally:
            self.display.stop()
        if self.trainer.stopped:
            error = Stopped(
                f"stopped by {self.stop.reason or 'another rank'} after step {self.progress.step}; --resume goes on "
                "from its checkpoint"
            )
            error.told = not self.world.main
            raise error

    def _while_waiting(self) -> None:
        """A source that gives nothing is not waited for when the run was asked to stop. (Of several ranks each waits:
        one alone cannot save. They leave at the second signal.)
        """
        if self.world.size == 1 and self.stop.asked():
            raise Stopped(f"stopped by {self.stop.reason} while rows were awaited; --resume goes on")

    def _train_on(self, checkpoint: Path | None) -> None:
        """Train to the end; where memory runs out, go on after the last whole step with smaller micro-batches."""
        while True:
            try:
                self.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
                return
            except torch.OutOfMemoryError as error:
                recover(self.trainer, error)
            except (DataError, Stopped):  # over rows that are streamed: what was trained before them is kept
                self.trainer.keep_step()
                raise
            step = self.progress.step
            checkpoint = checkpoint_folder(self.run.checkpoints, step) if step else None
            self._say_smaller(f"ran out in step {step + 1}")

    def _say_smaller(self, what: str) -> None:
        arguments, plan = self.trainer.args, self.trainer.checkpointing
        more = "all layers recomputing their activations, " if plan is not self.checkpointing else ""
        self.display.say(
            f"  memory     {what}; going on with {more}micro_batch_size {arguments.per_device_train_batch_size} and "
            f"{arguments.gradient_accumulation_steps} accumulations: the steps stay the same"
        )

    def _fit(self) -> None:
        """On GPUs that hold the whole model, find out before the first step whether its longest batch fits as well."""
        if self.world.layout == "fsdp2" or hardware.default_device().type != "cuda":
            return
        with self.world.phase("the longest batch"):
            fitting = fit_micro_batch(self.trainer)
        wanted = micro_batch(self.recipe, self.world.size)
        if fitting != wanted or self.trainer.checkpointing is not self.checkpointing:
            self._say_smaller(f"micro_batch_size {wanted} does not fit")

    def _sample(self, step: int, answers: Sequence[str]) -> None:
        """Log what the model answers at `step` to the questions that are sampled."""
        self.log.samples(step, sample_lines(step, self.scorer.questions, answers[: self.recipe.eval.samples]))

    def _not_finite(self, figures: dict[str, Any]) -> None:
        """Say which rows made a step that was left out. Raises: NonFiniteError after several in a row."""
        rows = self.trainer.rows_of_last_step()
        wheres = [where for row in rows for where in self.data.examples.wheres(row)]
        named = ", ".join(wheres[:ROWS_NAMED]) + (
            f" and {len(wheres) - ROWS_NAMED} more" if wheres[ROWS_NAMED:] else ""
        )
        what = f"step {figures['step']}: loss {figures['loss']}, gradient norm {figures['grad_norm']}, over {named}"
        if self.trainer.skipped >= SKIPPED_AT_MOST:
            error = NonFiniteError(
                f"{what}; {self.trainer.skipped} steps in a row were not finite: lower train.learning_rate, or look at "
                "these rows with gemma-ft preview"
            )
            error.told = not self.world.main
            raise error
        self.display.say(f"  {what}: not finite, this update is left out")
        figures |= {name: None for name in ("loss", "grad_norm") if not math.isfinite(figures[name] or 0.0)}
        figures["skipped"] = True

    def _trainer(self) -> GemmaTrainer:
        recipe, every = self.recipe, self.recipe.logging.every_steps
        held_out = self.data.held_out

        def on_step(figures: dict[str, Any]) -> None:
            if self.trainer.skipped:
                self._not_finite(figures)
            if figures["step"] % every == 0 or figures["step"] == self.total:
                self.log.step(figures)
            self.display.step(figures)

        def on_eval(step: int, loss: float | None) -> None:
            self.display.eval_loss = loss
            figures: Figures = {"eval_loss": loss, **self.scorer.compared(loss)}
            self.log.evaluation(step, figures)
            if step < self.total:  # the last answers are those of the model that is saved
                answers = self.scorer.sampled_answers(self.trainer.stop_now)
                if not self.trainer.stopped:
                    self._sample(step, answers)

        multiple = multiple_for(self.checkpointing.run.device, packing=recipe.data.packing)
        return GemmaTrainer(
            self.model,
            training_arguments(recipe, self.run.checkpoints, self.total, self.world, evaluates=held_out is not None),
            world=self.world,
            stop=self.stop,
            source=self.source,
            train_examples=self.data.examples,
            eval_examples=held_out.examples if held_out else None,
            collator=Collator(self.data.encoder.control.pad, multiple=multiple),
            tokenizer=self.tokenizer,
            schedule=recipe.train.schedule,
            warmup_ratio=recipe.train.warmup_ratio,
            autocast=torch.bfloat16 if recipe.strategy == "full" and recipe.train.precision == "bf16" else None,
            keep_checkpoints=recipe.checkpoint.keep,
            keep_best=recipe.checkpoint.keep_best,
            progress=self.progress,
            on_step=on_step,
            on_eval=on_eval,
            on_fault=lambda line: self.display.say(f"  {line}"),
        )
