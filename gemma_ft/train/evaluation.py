"""What a run is scored by, before, during and after training: held-out loss, answers, canary."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from gemma_ft.build.data import BuiltData
from gemma_ft.evaluate.forgetting import ForgettingSet, forgetting_losses
from gemma_ft.evaluate.held_out import Question, Score, answer_questions, exact_match, questions_of
from gemma_ft.recipe.schema import Eval
from gemma_ft.system.observer import SILENT, Observer
from gemma_ft.system.units import duration
from gemma_ft.train.distributed import World
from gemma_ft.train.fsdp import gathered_root
from gemma_ft.train.held_out_objective import HeldOutScore
from gemma_ft.train.progress import Progress

Figures = dict[str, float | None]
ANSWERS = "held-out answers"  # what is counted where they are generated
LONG_SECONDS = 60.0  # of scoring: what is shorter is not worth a word
SAMPLE_SECONDS = 60.0  # for the answers that are logged at an evaluation; they are cut then


def longer_than_training(scoring: float, step: float, steps: int) -> str | None:
    """What to say where scoring held-out rows once takes longer, in seconds, than so many steps of so many each."""
    if scoring < LONG_SECONDS or scoring < step * steps:
        return None
    return (
        f"scoring held-out rows took {duration(scoring)}, and does so again at the end; the {steps:,} steps of "
        f"training take about {duration(step * steps)}: lower eval.max_rows and eval.generate_rows"
    )


@dataclass
class Scorer:
    """Scores one model of a run. What the run knew before training is kept in `progress`, and so in every checkpoint.

    The model comes back in the mode and with the flags it had; the caller keeps the random state.
    """

    settings: Eval
    data: BuiltData
    canary: ForgettingSet | None
    model: Any
    tokenizer: PreTrainedTokenizerBase
    max_seq_len: int
    progress: Progress
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]
    world: World
    answers: bool = True  # False: the model gives scores, and is not asked

    def __post_init__(self) -> None:
        most = max(self.settings.generate_rows, self.settings.samples) if self.answers else 0
        found, _ = questions_of(self.data.held_out_items, self.data.encoder, max_seq_len=self.max_seq_len, limit=most)
        self.questions: list[Question] = found

    def score(self, held_out: HeldOutScore, observer: Observer = SILENT) -> Score:
        """Held-out loss and exact match of the model as it is now, with its answers: at least those to be sampled."""
        if self.data.held_out is None:
            return Score(None, None, [])
        asked = self.questions[: self.settings.generate_rows]
        job = observer.job(ANSWERS, len(asked)) if asked else contextlib.nullcontext(SILENT)
        with self.autocast(), gathered_root(self.model), job as counted:
            share, answers = exact_match(self.model, self.tokenizer, asked, advance=counted.advance, **self._limits)
        if self.settings.samples > self.settings.generate_rows:
            answers = self.sampled_answers()
        return Score(held_out.loss, share, answers, held_out.figures)

    def sampled_answers(self, stop: Callable[[], bool] = lambda: False) -> list[str]:
        """Greedy answers to the first `eval.samples` questions. Where ranks compute one model together they all say
        rank 0's tokens, so that none waits for another; `stop` cuts them, on all ranks at once, and so does
        SAMPLE_SECONDS.
        """
        asked = self.questions[: self.settings.samples]
        end = time.monotonic() + SAMPLE_SECONDS

        def enough() -> bool:
            return stop() or self.world.any(time.monotonic() > end)

        with self.autocast(), gathered_root(self.model):
            replies = answer_questions(self.model, self.tokenizer, asked, stop=enough, **self._limits)
        return [reply.text for reply in replies]

    def remember_base(self) -> None:
        """Before training: the canary loss of the model that is tuned, for a run that has no adapter to turn off."""
        if self.canary is not None and not hasattr(self.model, "disable_adapter"):
            loss = forgetting_losses(self.model, self.canary, autocast=self.autocast)["canary_loss"]
            self.progress.extra["canary"] = {"sha256": self.canary.sha256, "base_loss": loss}

    def compared(self, loss: float | None) -> Figures:
        """What was gained and forgotten: `gain`, the held-out loss before training minus `loss`; and the canary's."""
        before = self.progress.extra["before"]["loss"]
        figures: Figures = {"gain": None if before is None or loss is None else before - loss}
        if self.canary is None:
            return figures
        kept = self.progress.extra.get("canary", {})
        base_loss = kept.get("base_loss") if kept.get("sha256") == self.canary.sha256 else None
        return figures | forgetting_losses(self.model, self.canary, base_loss=base_loss, autocast=self.autocast)

    @property
    def _limits(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "stop_ids": self.data.encoder.stop_ids,
            "max_new_tokens": settings.max_new_tokens,
            "batch_size": settings.batch_size,
            "agree": self.world.of_first if self.world.layout == "fsdp2" else list,
        }
