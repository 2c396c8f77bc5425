"""What a run does with what its trainer tells: it logs, shows, asks for answers, and ends where nothing is learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gemma_ft.errors import NonFiniteError
from gemma_ft.evaluate.samples import sample_lines
from gemma_ft.system import hardware
from gemma_ft.train.evaluation import Figures
from gemma_ft.train.progress import Listener
from gemma_ft.train.run_context import TrainingLoop

ROWS_NAMED = 4
SKIPPED_AT_MOST = 3  # updates in a row that were not finite; then the run ends


def listener_of(course: TrainingLoop) -> Listener:
    """What a run does with what its trainer tells."""
    context, log = course.context, course.log
    every = context.recipe.logging.every_steps

    def on_step(figures: dict[str, Any]) -> None:
        if course.trainer.skipped:
            _not_finite(course, figures)
        if figures["step"] % every == 0 or figures["step"] == context.total:
            log.step(figures)
        _show(course, figures)

    def on_eval(step: int, loss: float | None) -> None:
        course.eval_loss = loss
        figures: Figures = {"eval_loss": loss, **course.scorer.compared(loss)}
        log.evaluation(step, figures)
        if step < context.total:  # the last answers are those of the model that is saved
            answers = course.scorer.sampled_answers(course.trainer.stop_now)
            if not course.trainer.stopped:
                log_samples(course, step, answers)

    return Listener(on_step, on_eval, on_fault=lambda line: context.observer.say(f"  {line}"))


def _show(course: TrainingLoop, figures: dict[str, Any]) -> None:
    """Tell the figures of an optimizer step."""
    held_out = {} if course.eval_loss is None else {"eval_loss": course.eval_loss}
    shown = {"loss": figures["loss"], **held_out, "tokens_per_second": figures["tokens_per_second"]}
    course.job.advance(**shown, peak_bytes=hardware.peak_memory_bytes())


def _not_finite(course: TrainingLoop, figures: dict[str, Any]) -> None:
    """Say which rows made a step that was left out. Raises: NonFiniteError after several in a row."""
    context, trainer = course.context, course.trainer
    wheres = [where for row in trainer.rows_of_last_step() for where in context.data.examples.wheres(row)]
    named = ", ".join(wheres[:ROWS_NAMED]) + (f" and {len(wheres) - ROWS_NAMED} more" if wheres[ROWS_NAMED:] else "")
    what = f"step {figures['step']}: loss {figures['loss']}, gradient norm {figures['grad_norm']}, over {named}"
    if trainer.skipped >= SKIPPED_AT_MOST:
        error = NonFiniteError(
            f"{what}; {trainer.skipped} steps in a row were not finite: lower train.learning_rate, or look at "
            "these rows with gemma-ft preview"
        )
        error.told = not context.world.main
        raise error
    context.observer.say(f"  {what}: not finite, this update is left out")
    figures |= {name: None for name in ("loss", "grad_norm") if not math.isfinite(figures[name] or 0.0)}
    figures["skipped"] = True


def log_samples(course: TrainingLoop, step: int, answers: Sequence[str]) -> None:
    """Log what the model answers at `step` to the questions that are sampled."""
    sampled = answers[: course.context.recipe.eval.samples]
    course.log.samples(step, sample_lines(step, course.scorer.questions, sampled))
