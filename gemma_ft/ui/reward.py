"""Rewards as a person sees them: how often the better answer is preferred, and how sure the model is of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from gemma_ft.evaluate.reward import calibration, reward_scores
from gemma_ft.infer.score_file import ScoreFile
from gemma_ft.infer.scorer import Scorer
from gemma_ft.system.units import NOTHING
from gemma_ft.ui.metric_text import notation
from gemma_ft.ui.progress import ConsoleObserver, say

ROWS = "  {done}/{total} rows  {figures}"  # lines of a file of rewards


def score_and_show(
    work: ScoreFile, scorer: Scorer, *, batch_size: int, overwrite: bool, stdout: Console, stderr: Console
) -> None:
    """Score what is left of the rows, with a bar on `stderr`; of pairs the figures go to `stdout`."""
    observer = ConsoleObserver(stderr, line=ROWS, stays=True)
    work.run(scorer, batch_size=batch_size, overwrite=overwrite, observer=observer)
    show_scores(work, stdout)


def show_scores(work: ScoreFile, console: Console) -> None:
    """Of a whole file of pairs: accuracy with its interval, and calibration."""
    if not work.pairs:
        return
    rewards = np.asarray(work.rewards(), dtype=np.float64)
    for name, one in reward_scores(rewards).items():
        found = one.estimated()
        value, low, high = (notation(name, figure, signed=False) for figure in (found.value, found.low, found.high))
        say(console, f"{name} {value}" + (f" ({low} … {high})" if found.low is not None else ""))
    console.print(calibration_table(calibration(rewards), f"{len(rewards):,} pairs"))


def calibration_table(bins: Sequence[dict[str, Any]], what: str) -> Table:
    """Of evaluate.reward.calibration."""
    table = Table(title=f"Calibration: {what}", title_justify="left")
    for name in ("preferred with", "pairs", "mean", "right"):
        table.add_column(name, justify="right")
    for one in bins:
        right = one["right"]
        share = NOTHING if right is None else f"{right['value']:.1%}"
        if right is not None and right["low"] is not None:
            share += f"  [dim]{right['low']:.1%} … {right['high']:.1%}[/dim]"
        mean = NOTHING if one["probability"] is None else f"{one['probability']:.1%}"
        table.add_row(f"{one['from']:.0%}–{one['to']:.0%}", f"{one['pairs']:,}", mean, share)
    return table
