"""A run from recipe to tuned Gemma, in reading order: build, score, train, score again, save."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from gemma_ft import runtime
from gemma_ft.build import BuiltData, build_data, build_model, build_tokenizer, fingerprint, inputs_of
from gemma_ft.checkpoint import as_json, newest_valid, replace_text
from gemma_ft.data.collate import Collator
from gemma_ft.errors import NonFiniteError, UserError
from gemma_ft.evaluate.canary import Canary, build_canary
from gemma_ft.evaluate.held_out import Score
from gemma_ft.evaluate.samples import sample_lines
from gemma_ft.recipe.load import LoadedRecipe
from gemma_ft.recipe.schema import Recipe
from gemma_ft.train.artefacts import save_result
from gemma_ft.train.display import Display, show_summary
from gemma_ft.train.outlook import outlook
from gemma_ft.train.run_dir import RunDir, append_line
from gemma_ft.train.scoring import Figures, Scorer
from gemma_ft.train.settings import total_steps, training_arguments
from gemma_ft.train.state import load_state, load_weights, randomness_kept
from gemma_ft.train.summary import summary_of
from gemma_ft.train.trackers import Tracker, build_trackers
from gemma_ft.train.trainer import GemmaTrainer, Progress
from gemma_ft.weights import Source

SAMPLES_KEPT = 10


def train_recipe(
    loaded: LoadedRecipe, *, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> int:
    """Train what a recipe says and write everything under its output_dir; returns the exit code 0.

    Raises: UserError and its children, one clear line each. Until the run is built, nothing in output_dir is touched.
    """
    recipe, display = loaded.recipe, Display(console or Console())
    if runtime.world_size() > 1:
        raise UserError(f"launched as {runtime.world_size()} processes: a run uses one device; use no launcher")
    run = RunDir(Path(recipe.output_dir))
    display.say(f"gemma-ft train {loaded.path} -> {run.root}")
    for note in loaded.notes:
        display.say(f"  note: {note}")
    run.check(resume=resume, overwrite=overwrite, inputs=inputs_of(recipe))
    if resume:
        run.check_recipe(recipe)
    tokenizer = build_tokenizer(recipe)
    data = build_data(recipe, tokenizer)
    canary = None
    if recipe.eval.canary is not None:
        canary = build_canary(recipe.eval.canary, data.encoder, batch_size=recipe.eval.batch_size)
    total = total_steps(recipe, len(data.train.examples))
    finished = run.steps_finished() if resume else None
    if finished is not None and finished >= total:
        display.say(f"{run.root}: already finished, {finished} steps; nothing to do")
        return 0
    model, source = build_model(recipe, tokenizer)
    display.plan(outlook(recipe, data, canary, model, source, total))
    course = _Run(recipe, run, display, tokenizer, data, canary, model, source, total)
    checkpoint = course.find_checkpoint() if resume else None
    if overwrite:
        run.clear()
    run.write_recipe(recipe)
    return course.go(checkpoint)


@dataclass
class _Run:
    """One run with everything it needs built."""

    recipe: Recipe
    run: RunDir
    display: Display
    tokenizer: PreTrainedTokenizerBase
    data: BuiltData
    canary: Canary | None
    model: Any
    source: Source | None
    total: int

    def __post_init__(self) -> None:
        self.progress = Progress(extra={"data": fingerprint(self.data.train.examples), "total": self.total})
        self.trackers: list[Tracker] = []
        self.trainer = self._trainer()
        self.scorer = Scorer(
            self.recipe.eval,
            self.data,
            self.canary,
            self.model,
            self.tokenizer,
            max_seq_len=self.recipe.data.max_seq_len,
            progress=self.progress,
            autocast=self.trainer.compute_loss_context_manager,
        )

    def find_checkpoint(self) -> Path | None:
        """The newest valid checkpoint, its progress taken over; None when there is none yet.

        Raises: CheckpointError when all are damaged; UserError when the training rows are not those of the checkpoint.
        """
        checkpoint = newest_valid(self.run.checkpoints, self.display.say)
        if checkpoint is None:
            return None
        now = self.progress.extra
        vars(self.progress).update(load_state(checkpoint))
        before = self.progress.extra
        if before["data"] != now["data"]:
            raise UserError(
                f"{self.run.root}: cannot resume: {self.recipe.data.train} gives other training rows than before; "
                "restore it, or start a new output_dir"
            )
        self.display.say(f"  resuming   after step {self.progress.step}, from {checkpoint}")
        if before["total"] != self.total:
            self.display.say(f"  note: the learning rate now runs over {self.total} steps, was {before['total']}")
            before["total"] = self.total
        return checkpoint

    def go(self, checkpoint: Path | None) -> int:
        """Score, train, score again, save; the order of a run."""
        self.run.cut_logs(self.progress.step)
        # what was measured of the weights before is not of these
        for said_at_the_end in (self.run.summary, self.run.report, self.run.eval_results, self.run.certificate):
            said_at_the_end.unlink(missing_ok=True)
        self.trackers += build_trackers(self.recipe, self.run.root, self.display.say)
        try:
            if checkpoint is None:
                self._score_before()
            self._train(checkpoint)
            if self.recipe.strategy == "full":  # what is scored is what is saved
                self.model.to(runtime.dtype_by_name(self.recipe.train.precision))
            after = self._score()
            compared = self.scorer.compared(after.loss)
            self._track(self.progress.step, {**after.figures(), **compared})
            self._sample(self.progress.step, after.answers)
            result = save_result(self.run, self.recipe, self.model, self.tokenizer, self.data.encoder, self.source)
            summary = summary_of(
                self.progress,
                after=after,
                compared=compared,
                questions=self.scorer.questions,
                result=result.name,
                train=self.data.train,
            )
            replace_text(self.run.summary, as_json(summary))
        finally:
            for tracker in self.trackers:
                tracker.close()
        report = self._report()
        show_summary(self.display.console, summary, self.run, report)
        return 0

    def _score(self) -> Score:
        return self.scorer.score(self.trainer.get_eval_dataloader() if self.data.held_out else ())

    def _score_before(self) -> None:
        with randomness_kept():
            score = self._score()
            self.scorer.remember_base()
        kept = max(SAMPLES_KEPT, self.recipe.eval.samples)
        self.progress.extra["before"] = {**score.figures(), "answers": score.answers[:kept]}
        self._track(0, score.figures())
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
                self.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except KeyboardInterrupt:
            saved = sorted(self.run.checkpoints.glob("step-*"))
            cure = f"goes on from {saved[-1].name}" if saved else "starts again: checkpoint.every_steps saved none yet"
            self.display.say(f"stopped after step {self.progress.step}; --resume {cure}")
            raise
        finally:
            self.display.stop()

    def _track(self, step: int, figures: Figures) -> None:
        known = {f"eval_{name.removeprefix('eval_')}": value for name, value in figures.items() if value is not None}
        for tracker in self.trackers:
            tracker.log(step, known)

    def _sample(self, step: int, answers: Sequence[str]) -> None:
        """Log what the model answers at `step` to the questions that are sampled."""
        lines = sample_lines(step, self.scorer.questions, answers[: self.recipe.eval.samples])
        self.run.write_samples(step, lines)
        for tracker in self.trackers:
            tracker.samples(step, lines)

    def _trainer(self) -> GemmaTrainer:
        recipe, every = self.recipe, self.recipe.logging.every_steps
        held_out = self.data.held_out

        def on_step(figures: dict[str, Any]) -> None:
            if not (math.isfinite(figures["loss"]) and math.isfinite(figures["grad_norm"] or 0.0)):
                raise NonFiniteError(
                    f"step {figures['step']}: loss {figures['loss']}, gradient norm {figures['grad_norm']}; "
                    "lower train.learning_rate, or look at the data with gemma-ft preview; this step was not saved"
                )
            if figures["step"] % every == 0 or figures["step"] == self.total:
                append_line(self.run.metrics, figures)
                for tracker in self.trackers:
                    tracker.log(figures["step"], {key: value for key, value in figures.items() if key != "step"})
            self.display.step(figures)

        def on_eval(step: int, loss: float | None) -> None:
            self.display.eval_loss = loss
            figures: Figures = {"eval_loss": loss, **self.scorer.compared(loss)}
            append_line(self.run.evals, {"step": step, **figures})
            self._track(step, figures)
            if step < self.total:  # the last answers are those of the model that is saved
                self._sample(step, self.scorer.sampled_answers())

        return GemmaTrainer(
            self.model,
            training_arguments(recipe, self.run.checkpoints, self.total, evaluates=held_out is not None),
            train_dataset=Dataset.from_list(self.data.train.examples),
            eval_dataset=Dataset.from_list(held_out.examples) if held_out else None,
            collator=Collator(self.data.encoder.control.pad),
            tokenizer=self.tokenizer,
            schedule=recipe.train.schedule,
            warmup_ratio=recipe.train.warmup_ratio,
            autocast=torch.bfloat16 if recipe.strategy == "full" and recipe.train.precision == "bf16" else None,
            keep_checkpoints=recipe.checkpoint.keep,
            progress=self.progress,
            on_step=on_step,
            on_eval=on_eval,
        )
