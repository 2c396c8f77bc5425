"""What a person sees of an evaluation: what is scored, a bar while it is, tables and answers after it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from gemma_ft.build.data import BuiltData
from gemma_ft.data.pack.arrange import DataStats
from gemma_ft.evaluate.held_out import Question
from gemma_ft.evaluate.metrics import METRICS
from gemma_ft.evaluate.perplexity import Pieces
from gemma_ft.recipe.schema import Recipe
from gemma_ft.system.escape import printable
from gemma_ft.system.units import NOTHING

SAMPLES_SHOWN = 3
LOSSES = ("loss", "perplexity")


class EvalDisplay:
    """Results go to `stdout`; notes and the bar, or plain lines where there is no terminal, to `stderr`."""

    def __init__(self, stdout: Console, stderr: Console) -> None:
        self.stdout, self.stderr = stdout, stderr
        self._bar: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> EvalDisplay:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, text: str) -> None:
        """One line beside the work."""
        console = self._bar.console if self._bar is not None else self.stderr
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def about(
        self, data: BuiltData, pieces: Pieces | None, questions: Sequence[Question], too_long: int, recipe: Recipe
    ) -> None:
        """The rows that are scored, and what is worth knowing about them."""
        if pieces is None:
            return
        self.note(f"held out: {data.eval_source}: {pieces.stats.rows:,} rows scored, {len(questions):,} answered")
        if pieces.single_document:
            self.note(
                f"  a single document, in {len(pieces.pieces):,} windows: these are resampled, and counted as rows"
            )
        for line in _notes(pieces.stats):
            self.note(f"  {line}")
        if too_long:
            limit = recipe.data.max_seq_len
            self.note(f"  {too_long:,} rows not answered: their question does not fit data.max_seq_len {limit}")
        if not questions and recipe.eval.generate_rows == 0:
            self.note("  no answers are generated: eval.generate_rows is 0; --rows N asks for some")
        if data.overlap:
            self.note(f"  {data.overlap:,} held-out rows are training rows too: their scores mean little")

    def start(self, total: int) -> None:
        """Show that `total` steps lie ahead."""
        if self.stderr.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                console=self.stderr,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("loading", total=total)

    def phase(self, text: str) -> None:
        """Say what is being done now."""
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        else:
            self.note(f"  {text}")

    def advance(self, count: int) -> None:
        """Count steps that are done."""
        if self._bar is not None:
            self._bar.advance(self._task, count)

    def show(self, results: dict[str, Any]) -> None:
        """The tables, and a few answers."""
        figures = {
            name: {**scores, **_of_tasks(results["tasks"].get(name, {}))} for name, scores in results["models"].items()
        }
        self.stdout.print(_table(figures))
        if results["differences"]:
            self.stdout.print(_difference_table(results["differences"]))
            self._legend("95% intervals by resampling rows; * marks a difference whose interval excludes 0")
        else:
            self._legend("95% intervals by resampling rows")
        for sample in results["samples"][:SAMPLES_SHOWN]:
            self._sample(sample)

    def kept(self, out: Path | None) -> None:
        """Where it all lies now."""
        where = out if out is not None else "not written; --out FILE keeps them"
        self.stdout.print(f"\nresults: {where}", markup=False, highlight=False, soft_wrap=True)

    def _legend(self, text: str) -> None:
        self.stdout.print(text, style="dim", highlight=False)

    def _sample(self, sample: dict[str, Any]) -> None:
        width = max(map(len, ("expected", *sample["answers"])))
        self.stdout.print(f"\n[bold]{_plain(sample['prompt'])}[/bold]", highlight=False, soft_wrap=True)
        for label, text in (("expected", sample["expected"]), *sample["answers"].items()):
            style = "dim" if label == "expected" else "green" if text == sample["expected"].strip() else "yellow"
            line = f"  {label:<{width}} [{style}]{_plain(text)}[/{style}]"
            self.stdout.print(line, highlight=False, soft_wrap=True)


def _notes(stats: DataStats) -> list[str]:
    """What became of rows that were not scored as they stand."""
    return stats.describe().splitlines()[2:]


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


def label_of(metric: str) -> str:
    """A metric's name, with an arrow where less is better; a task's as its author wrote it."""
    if metric in LOSSES:
        return f"{metric} ↓"
    return metric.replace("_", " ") if metric in METRICS else metric


def _estimate_text(metric: str, found: dict[str, Any], *, signed: bool = False) -> str:
    """Value over interval, in the metric's own notation; a difference with its sign, and a star."""
    value, low, high = (notation(metric, found[key], signed) for key in ("value", "low", "high"))
    if found["low"] is None:
        return value
    star = "*" if signed and (found["low"] > 0 or found["high"] < 0) else ""
    return f"{value}{star}\n[dim]{low} … {high}[/dim]"


def notation(metric: str, value: float | None, signed: bool) -> str:
    """A metric's figure as it is usually written: percent, points, or plain; a difference with its sign."""
    if value is None:
        return NOTHING
    sign = "+" if signed else ""
    if metric == "perplexity":
        return f"{value:{sign}.3f}" if abs(value) < 1e4 else f"{value:{sign}.3g}"
    if metric in METRICS:
        top = METRICS[metric].top
        return f"{value:{sign}.1f}" if top == 100 else f"{100 * value:{sign}.1f}%"
    return f"{value:{sign}.4f}" if abs(value) < 1e4 else f"{value:{sign}.4g}"
