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
from gemma_ft.build import BuiltData, build_data, build_model, build_tokenizer, conversations
from gemma_ft.checkpoint import as_json, newest_valid, replace_text
from gemma_ft.data.collate import Collator
from gemma_ft.errors import NonFiniteError, UserError
from gemma_ft.evaluate.held_out import Question, Score, exact_match, held_out_loss
from gemma_ft.load import Source
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

SAMPLES_KEPT = 10


def train_recipe(
    loaded: LoadedRecipe, *, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> int:
    """Train what a recipe says and write everything under its output_dir; returns the exit code 0.

    Raises: UserError and its children, one clear line each, before anything of an earlier run is touched.
    """
    recipe, display = loaded.recipe, Display(console or Console())
    if runtime.world_size() > 1:
        raise UserError(
            f"launched as {runtime.world_size()} processes: a run uses one device; start it without a launcher"
        )
    run = RunDir(Path(recipe.output_dir))
    display.say(f"gemma-ft train {loaded.path} -> {run.root}")
    for note in loaded.notes:
        display.say(f"  note: {note}")
    run.check(resume=resume, overwrite=overwrite)
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
    if overwrite:  # only now: a run that cannot even be built leaves the old one as it was
        run.clear()
    run.write_recipe(recipe)
    display.plan(outlook(recipe, data, model, source, total))
    return _Run(recipe, run, display, tokenizer, data, model, source, total).go(resume)


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

    def go(self, resume: bool) -> int:
        """Score, train, score again, save; the order of a run."""
        checkpoint = newest_valid(self.run.checkpoints, self.display.say) if resume else None
        progress = Progress()
        if checkpoint is not None:
            vars(progress).update(load_state(checkpoint))
            self.display.say(f"  resuming   after step {progress.step}, from {checkpoint}")
        self.run.cut_logs(progress.step)
        self.run.summary.unlink(missing_ok=True)
        trackers = build_trackers(self.recipe, self.run.root, self.display.say)
        trainer = self._trainer(progress, trackers)
        if checkpoint is None:
            score = self._score(trainer)
            progress.extra["before"] = {**score.figures(), "answers": score.answers[:SAMPLES_KEPT]}
        self.display.start(self.total, progress.step)
        try:
            if checkpoint is not None and progress.step >= self.total:
                load_weights(
                    checkpoint, self.model
                )  # only scoring and saving are left; Trainer would take one step more
            else:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except KeyboardInterrupt:
            self.display.say(f"stopped after step {progress.step}; --resume goes on from the newest checkpoint")
            raise
        finally:
            self.display.stop()
            for tracker in trackers:
                tracker.close()
        after = self._score(trainer)
        result = save_result(self.run, self.recipe, self.model, self.tokenizer, self.data.encoder, self.source)
        summary = self._summary(progress, after, result)
        replace_text(self.run.summary, as_json(summary))
        show_summary(self.display.console, summary, self.run.root)
        return 0

    def _trainer(self, progress: Progress, trackers: Sequence[Tracker]) -> GemmaTrainer:
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
                for tracker in trackers:
                    tracker.log(figures["step"], {key: value for key, value in figures.items() if key != "step"})
            self.display.step(figures)

        def on_eval(step: int, loss: float | None) -> None:
            self.display.eval_loss = loss
            append_line(self.run.evals, {"step": step, "eval_loss": loss})
            for tracker in trackers:
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
            progress=progress,
            on_step=on_step,
            on_eval=on_eval,
        )

    def _score(self, trainer: GemmaTrainer) -> Score:
        """The held-out loss and exact match of the model as it is now."""
        if self.data.held_out is None:
            return Score(None, None, [])
        loss = held_out_loss(self.model, trainer.get_eval_dataloader(), autocast=trainer.compute_loss_context_manager)
        settings = self.recipe.eval
        with trainer.compute_loss_context_manager():
            share, answers = exact_match(
                self.model,
                self.tokenizer,
                self._questions(),
                stop_ids=self.data.encoder.stop_ids,
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
            )
        return Score(loss, share, answers)

    def _questions(self) -> list[Question]:
        chosen = conversations(self.data.held_out_items, self.recipe.eval.generate_rows)
        return [
            Question(self.data.encoder.encode_prompt(chat.turns), chat.turns[-2].content, chat.turns[-1].content)
            for chat in chosen
        ]

    def _summary(self, progress: Progress, after: Score, result: Path) -> dict[str, Any]:
        before = dict(progress.extra["before"])
        answers = before.pop("answers")
        samples = [
            {"prompt": question.prompt, "expected": question.answer, "before": first, "after": last}
            for question, first, last in zip(self._questions(), answers, after.answers, strict=False)
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
