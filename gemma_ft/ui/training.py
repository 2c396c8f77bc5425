"""`gemma-ft train` as a person sees it: lines before it, a bar during it, a table and a page after it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gemma_ft.recipe.load import LoadedRecipe
from gemma_ft.recipe.run_files import RunFiles
from gemma_ft.system.units import NOTHING, byte_size, duration, number
from gemma_ft.train.run import train_recipe
from gemma_ft.train.summary import TrainedRun
from gemma_ft.ui.metric_text import LOSS_PER, SCORES, score_of, with_interval
from gemma_ft.ui.pages.page import write_report
from gemma_ft.ui.progress import STEPS, ConsoleObserver, say

SAMPLES_SHOWN = 3


def train_and_show(
    loaded: LoadedRecipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop_file: Path | None = None,
    allow_drift: Sequence[str] = (),
    console: Console | None = None,
) -> int:
    """Train as `train_recipe` does, and print and write a page of what came of it; returns the exit code 0.

    Raises: UserError and its children, as `train_recipe`.
    """
    console = console or Console()
    return train_recipe(
        loaded,
        resume=resume,
        overwrite=overwrite,
        stop_file=stop_file,
        allow_drift=allow_drift,
        observer=ConsoleObserver(console, line=STEPS, stays=True),
        finish=partial(finish, console),
    )


def finish(console: Console, trained: TrainedRun) -> None:
    """Write the page of a run that has come to its end, and show its summary."""
    show_summary(console, trained, _page(console, trained.run))


def _page(console: Console, run: RunFiles) -> Path | None:
    """The run's page; one line instead of it when it cannot be made, for the run itself is whole."""
    try:
        return write_report(run.root, run.report)
    except Exception as error:
        say(console, f"report.html could not be made ({type(error).__name__}: {error}); the run is complete")
        return None


def show_summary(console: Console, trained: TrainedRun, report: Path | None) -> None:
    """The table at the end of a run: before and after, speed, memory, where things lie, and a few answers."""
    summary, run = trained.summary, trained.run
    before, after = summary["eval_before"], summary["eval_after"]
    table = Table(title="What was learned", title_justify="left")
    table.add_column("held-out")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name, label, written in (*SCORES[trained.rows], ("loss", LOSS_PER[trained.rows], number)):
        figures = [score.get(name) for score in (before, after)]
        if trained.rows == "answers" or figures != [None, None]:
            table.add_row(label, written(before.get(name)), score_of(after, name, written))
    if "win_rate" in summary:
        table.add_row("better answers", NOTHING, with_interval(summary["win_rate"]))
    if "canary_loss" in summary:
        table.add_row("canary loss", number(summary["canary_base_loss"]), number(summary["canary_loss"]))
    if table.row_count:
        console.print(table)
    seconds = duration(summary["seconds"], in_seconds=True)
    facts = [
        ("steps", f"{summary['steps']:,}, {summary['tokens']:,} tokens in {seconds}"),
        ("speed", f"{summary['tokens_per_second']:,.0f} tokens/s"),
        ("peak", byte_size(summary["peak_bytes"])),
        ("result", str(run.root / summary["result"])),
        ("metrics", str(run.metrics)),
        ("summary", str(run.summary)),
    ]
    facts += [("report", str(report))] if report is not None else []
    facts += [("warning", summary["forgetting_note"])] if summary["forgetting_note"] else []
    for label, text in facts:
        say(console, f"  {label:<8} {text}")
    for sample in summary["samples"][:SAMPLES_SHOWN]:
        console.print(f"\n[bold]{escape(sample['prompt'])}[/bold]", highlight=False, soft_wrap=True)
        for label, style in (("before", "yellow"), ("after", "green")):
            console.print(f"  {label:<6} [{style}]{escape(sample[label])}[/{style}]", highlight=False, soft_wrap=True)
