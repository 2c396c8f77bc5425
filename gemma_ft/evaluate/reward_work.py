"""What `gemma-ft eval` asks of reward models: rewards of held-out pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gemma_ft.build.data import BuiltData
from gemma_ft.data.conversation import Pair
from gemma_ft.errors import UserError
from gemma_ft.evaluate.results import Measured, differences_of, estimates_of
from gemma_ft.evaluate.reward import calibration, pair_rewards, pair_sequences, reward_scores
from gemma_ft.system import environment
from gemma_ft.system.observer import Job, Observer


@dataclass(frozen=True)
class RewardWork:
    """Everything that is asked of each model, built once."""

    source: str
    settings: dict[str, Any]
    sequences: list[tuple[list[int], list[int]]]
    pad_id: int
    calibrations: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # of each model that was measured

    @property
    def steps(self) -> int:
        """What the progress bar counts for one model: answers."""
        return 2 * len(self.sequences)

    def measure(self, name: str, model: Any, job: Job) -> Measured:
        """All figures of one model."""
        job.phase(f"{name}: rewards")
        batch_size = self.settings["batch_size"]
        rewards = pair_rewards(
            model, self.sequences, pad_id=self.pad_id, batch_size=batch_size, on_progress=job.advance
        )
        self.calibrations[name] = calibration(rewards)
        return Measured(reward_scores(rewards))

    def results(self, measured: dict[str, Measured]) -> dict[str, Any]:
        """What eval.json holds."""
        return {
            "source": self.source,
            "rows": len(self.sequences),
            "models": {name: estimates_of(one.scores) for name, one in measured.items()},
            "differences": differences_of(measured),
            "calibration": self.calibrations,
            "samples": [],
            "tasks": {},
            "settings": self.settings,
            "versions": environment.versions(),
        }


def reward_work(
    source: str, data: BuiltData, settings: dict[str, Any], observer: Observer, *, options: Mapping[str, Any]
) -> RewardWork:
    """The held-out pairs of `data` as they are scored. options: those that are of answers, by their names.

    Raises: UserError for one of these that was given; where no pair is left.
    """
    for option, value in options.items():
        if value:
            raise UserError(f"{option}: of answers, and a reward model writes none; leave it out")
    pairs = [one for one in data.held_out_items[: settings["max_rows"]] if isinstance(one, Pair)]
    sequences, too_long = pair_sequences(pairs, data.encoder, max_seq_len=settings["max_seq_len"])
    if not sequences:
        raise UserError(f"{source}: no held-out pair fits data.max_seq_len {settings['max_seq_len']}; raise it")
    observer.say(f"held out: {data.eval_source}: {len(sequences):,} pairs scored")
    if too_long:
        limit = settings["max_seq_len"]
        observer.say(f"  {too_long:,} pairs left out: an answer does not fit data.max_seq_len {limit}")
    if data.overlap:
        observer.say(f"  {data.overlap:,} held-out rows are training rows too: their scores mean little")
    return RewardWork(source, settings, sequences, data.encoder.control.pad)
