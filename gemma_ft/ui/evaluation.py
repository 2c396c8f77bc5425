"""`gemma-ft eval` as a person sees it: a bar while models are scored, tables and answers after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gemma_ft.evaluate.compare import EvalOptions, evaluate_models
from gemma_ft.evaluate.models import ModelsToCompare
from gemma_ft.system.escape import printable
from gemma_ft.system.units import NOTHING
from gemma_ft.ui.metric_text import label_of, notation
from gemma_ft.ui.progress import ConsoleObserver, say
from gemma_ft.ui.reward import calibration_table

SAMPLES_SHOWN = 3


def evaluate_and_show(
    compared: ModelsToCompare, options: EvalOptions, *, stdout: Console, stderr: Console
) -> dict[str, Any]:
    """Score the models that are compared, show the table, write eval.json; returns what it holds. Results go to
    `stdout`; notes and the bar, or plain lines where there is no terminal, to `stderr`.

    Raises: UserError in one line; then nothing is written. DiskError after the tables.
    """
    evaluation = evaluate_models(compared, options, observer=ConsoleObserver(stderr))
    show_results(stdout, evaluation.results)
    evaluation.write()
    where = evaluation.out if evaluation.out is not None else "not written; --out FILE keeps them"
    say(stdout, f"\nresults: {where}")
    return evaluation.results


def show_results(console: Console, results: dict[str, Any]) -> None:
    """The tables, and a few answers."""
    figures = {
        name: {**scores, **_of_tasks(results["tasks"].get(name, {}))} for name, scores in results["models"].items()
    }
    console.print(_table(figures))
    legend = "95% intervals by resampling rows"
    if results["differences"]:
        console.print(_difference_table(results["differences"]))
        legend += "; * marks a difference whose interval excludes 0"
    console.print(legend, style="dim", highlight=False)
    for name, bins in results.get("calibration", {}).items():
        console.print(calibration_table(bins, name))
    for sample in results["samples"][:SAMPLES_SHOWN]:
        _show_sample(console, sample)


def _show_sample(console: Console, sample: dict[str, Any]) -> None:
    width = max(map(len, ("expected", *sample["answers"])))
    console.print(f"\n[bold]{_plain(sample['prompt'])}[/bold]", highlight=False, soft_wrap=True)
    for label, text in (("expected", sample["expected"]), *sample["answers"].items()):
        style = "dim" if label == "expected" else "green" if text == sample["expected"].strip() else "yellow"
        console.print(f"  {label:<{width}} [{style}]{_plain(text)}[/{style}]", highlight=False, soft_wrap=True)


def _plain(text: str) -> str:
    """A model's or a user's text, which may not steer the terminal or be read as markup."""
    return escape(printable(text))


def _of_tasks(tasks: dict[str, Any]) -> dict[str, Any]:
    return {f"{task}: {metric}": one for task, figures in tasks.items() for metric, one in figures.items()}


def _table(figures: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="Held-out rows and tasks", title_justify="left")
    table.add_column("metric")
    for name in figures:
        table.add_column(name, justify="right")
    table.add_column("rows", justify="right")
    metrics = list(next(iter(figures.values())))
    for metric in metrics:
        cells = [_estimate_text(metric, figures[name][metric]) for name in figures]
        rows = next(iter(figures.values()))[metric]["rows"]
        table.add_row(escape(label_of(metric)), *cells, f"{rows:,}" if rows else NOTHING)
    return table


def _difference_table(differences: Sequence[dict[str, Any]]) -> Table:
    pairs = list(dict.fromkeys((one["of"], one["minus"]) for one in differences))
    table = Table(title="Differences on the same rows", title_justify="left")
    table.add_column("metric")
    for later, earlier in pairs:
        table.add_column(f"{later} − {earlier}", justify="right")
    for metric in dict.fromkeys(one["metric"] for one in differences):
        cells = []
        for pair in pairs:
            found = [one for one in differences if one["metric"] == metric and (one["of"], one["minus"]) == pair]
            cells.append(_estimate_text(metric, found[0], signed=True) if found else NOTHING)
        table.add_row(escape(label_of(metric)), *cells)
    return table


def _estimate_text(metric: str, found: dict[str, Any], *, signed: bool = False) -> str:
    """Value over interval, in the metric's own notation; a difference with its sign, and a star."""
    value, low, high = (notation(metric, found[key], signed) for key in ("value", "low", "high"))
    if found["low"] is None:
        return value
    star = "*" if signed and (found["low"] > 0 or found["high"] < 0) else ""
    return f"{value}{star}\n[dim]{low} … {high}[/dim]"
