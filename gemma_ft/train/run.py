"""A run from recipe to tuned Gemma, in reading order: build, score, train, score again, save."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from gemma_ft import runtime
from gemma_ft.build import BuiltData, build_data, build_model, build_tokenizer, conversations, fingerprint, inputs_of
from gemma_ft.checkpoint import as_json, newest_valid, replace_text
from gemma_ft.data.collate import Collator
from gemma_ft.errors import NonFiniteError, UserError
from gemma_ft.evaluate.held_out import Question, Score, exact_match, held_out_loss
from gemma_ft.recipe.load import LoadedRecipe
from gemma_ft.recipe.schema import Recipe
from gemma_ft.train.artefacts import save_result
from gemma_ft.train.display import Display, show_summary
from gemma_ft.train.outlook import outlook
from gemma_ft.train.run_dir import RunDir, append_line
from gemma_ft.train.settings import total_steps, training_arguments
from gemma_ft.train.state import load_state, load_weights
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
    total = total_steps(recipe, len(data.train.examples))
    finished = run.steps_finished() if resume else None
    if finished is not None and finished >= total:
        display.say(f"{run.root}: already finished, {finished} steps; nothing to do")
        return 0
    model, source = build_model(recipe, tokenizer)
    display.plan(outlook(recipe, data, model, source, total))
    course = _Run(recipe, run, display, tokenizer, data, model, source, total)
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
    model: Any
    source: Source | None
    total: int

    def __post_init__(self) -> None:
        self.progress = Progress(extra={"data": fingerprint(self.data.train.examples), "total": self.total})
        self.trackers: list[Tracker] = []
        self.questions = self._questions()
        self.trainer = self._trainer()

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
        self.run.summary.unlink(missing_ok=True)
        self.trackers += build_trackers(self.recipe, self.run.root, self.display.say)
        try:
            if checkpoint is None:
                score = self._score()
                self.progress.extra["before"] = {**score.figures(), "answers": score.answers[:SAMPLES_KEPT]}
                self._track(0, score)
            self._train(checkpoint)
            if self.recipe.strategy == "full":  # what is scored is what is saved
                self.model.to(runtime.dtype_by_name(self.recipe.train.precision))
            after = self._score()
            self._track(self.progress.step, after)
            result = save_result(self.run, self.recipe, self.model, self.tokenizer, self.data.encoder, self.source)
            summary = self._summary(after, result)
            replace_text(self.run.summary, as_json(summary))
        finally:
            for tracker in self.trackers:
                tracker.close()
        show_summary(self.display.console, summary, self.run.root)
        return 0

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

    def _track(self, step: int, score: Score) -> None:
        figures = {f"eval_{name}": value for name, value in score.figures().items() if value is not None}
        for tracker in self.trackers:
            tracker.log(step, figures)

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
            append_line(self.run.evals, {"step": step, "eval_loss": loss})
            for tracker in self.trackers:
                tracker.log(step, {"eval_loss": loss})

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

    def _score(self) -> Score:
        """The held-out loss and exact match of the model as it is now."""
        if self.data.held_out is None:
            return Score(None, None, [])
        trainer = self.trainer
        loss = held_out_loss(self.model, trainer.get_eval_dataloader(), autocast=trainer.compute_loss_context_manager)
        settings = self.recipe.eval
        with trainer.compute_loss_context_manager():
            share, answers = exact_match(
                self.model,
                self.tokenizer,
                self.questions,
                stop_ids=self.data.encoder.stop_ids,
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
            )
        return Score(loss, share, answers)

    def _questions(self) -> list[Question]:
        """Held-out conversations to be answered: those whose question fits max_seq_len, as in the held-out loss."""
        questions: list[Question] = []
        for chat in conversations(self.data.held_out_items):
            if len(questions) == self.recipe.eval.generate_rows:
                break
            ids = self.data.encoder.encode_prompt(chat.turns)
            if len(ids) < self.recipe.data.max_seq_len:
                questions.append(Question(ids, chat.turns[-2].content, chat.turns[-1].content))
        return questions

    def _summary(self, after: Score, result: Path) -> dict[str, Any]:
        progress = self.progress
        before = dict(progress.extra["before"])
        answers = before.pop("answers")
        samples = [
            {"prompt": question.prompt, "expected": question.answer, "before": first, "after": last}
            for question, first, last in zip(self.questions, answers, after.answers, strict=False)
        ]
        return {
            "steps": progress.step,
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else 0.0,
            "peak_bytes": runtime.peak_memory_bytes(),
            "train_loss": progress.last_loss,  # of the last optimizer step
            "eval_before": before,
            "eval_after": after.figures(),
            "result": result.name,
            "samples": samples,
            "data": self.data.train.stats.as_dict(),
            "versions": runtime.versions(),
        }
