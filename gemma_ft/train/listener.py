"""What a run does with what its trainer tells: it logs, shows, asks for answers, and ends where nothing is learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gemma_ft.errors import NonFiniteError
from gemma_ft.evaluate.samples import sample_lines
from gemma_ft.system import hardware
from gemma_ft.train.evaluation import Figures, longer_than_training
from gemma_ft.train.falling import chosen_falls
from gemma_ft.train.held_out_objective import HeldOutScore
from gemma_ft.train.progress import Listener
from gemma_ft.train.run_context import TrainingLoop

ROWS_NAMED = 4
BESIDE = (("rewards/margins", "rewards/accuracies"), ("rewards/chosen", "rewards/rejected", "rewards/margins"))
ALSO = ("kl", "entropy")
STEP_KNOWN = 3  # the step after which it is known how long one takes
SKIPPED_AT_MOST = 3  # updates in a row that were not finite; then the run ends


def listener_of(loop: TrainingLoop) -> Listener:
    """What a run does with what its trainer tells."""
    context, log = loop.context, loop.log
    every = context.recipe.logging.every_steps

    def on_step(figures: dict[str, Any]) -> None:
        if loop.trainer.skipped:
            _not_finite(loop, figures)
        _tell_falling(loop, figures)
        _tell_scoring(loop, figures)
        if figures["step"] % every == 0 or figures["step"] == context.total:
            log.step(figures)
        _show(loop, figures)

    def on_eval(step: int, score: HeldOutScore) -> None:
        loop.eval_loss = score.loss
        shown = {f"eval_{name}": value for name, value in score.figures.items()}
        figures: Figures = {"eval_loss": score.loss, **shown, **loop.scorer.compared(score.loss)}
        log.evaluation(step, figures)
        if step < context.total:  # the last answers are those of the model that is saved
            answers = loop.scorer.sampled_answers(loop.trainer.stop_now)
            if not loop.trainer.stopped:
                log_samples(loop, step, answers)

    return Listener(on_step, on_eval, on_fault=lambda line: context.observer.say(f"  {line}"))


def _show(loop: TrainingLoop, figures: dict[str, Any]) -> None:
    """Tell the figures of an optimizer step."""
    held_out = {} if loop.eval_loss is None else {"eval_loss": loop.eval_loss}
    own = {name: figures[name] for name in _shown_beside(figures)}
    shown = {"loss": figures["loss"], **held_out, **own, "tokens_per_second": figures["tokens_per_second"]}
    loop.job.advance(**shown, peak_bytes=hardware.peak_memory_bytes())


def _shown_beside(figures: dict[str, Any]) -> Sequence[str]:
    """Which figures of preferences stand beside the loss: margin and accuracy of pairs, else both rewards and what
    lies between them; then how far the policy has moved, and how sure it is.
    """
    found = next((names for names in BESIDE if all(name in figures for name in names)), ())
    return (*found, *(name for name in ALSO if name in figures)) if found else ()


def _tell_falling(loop: TrainingLoop, figures: dict[str, Any]) -> None:
    """Say it once where the chosen answers of pairs got less likely; what is needed for it is in every checkpoint."""
    objective = loop.context.recipe.objective
    if objective.rows == "answers":
        return
    past = loop.progress.extra.setdefault("falling", {})
    line = chosen_falls(figures, past, getattr(objective, "sft_weight", None))
    if line is not None:
        loop.context.observer.say(f"  note       {line}")


def _tell_scoring(loop: TrainingLoop, figures: dict[str, Any]) -> None:
    """Say it once, when it is known how long a step takes, where scoring takes longer than training."""
    progress, context = loop.progress, loop.context
    if figures["step"] != min(STEP_KNOWN, context.total):
        return
    line = longer_than_training(loop.scoring_seconds, progress.seconds / progress.step, context.total)
    if line is not None:
        context.observer.say(f"  note       {line}")


def _not_finite(loop: TrainingLoop, figures: dict[str, Any]) -> None:
    """Say which rows made a step that was left out. Raises: NonFiniteError after several in a row."""
    context, trainer = loop.context, loop.trainer
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


def log_samples(loop: TrainingLoop, step: int, answers: Sequence[str]) -> None:
    """Log what the model answers at `step` to the questions that are sampled."""
    sampled = answers[: loop.context.recipe.eval.samples]
    loop.log.samples(step, sample_lines(step, loop.scorer.questions, sampled))
