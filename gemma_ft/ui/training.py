"""What a person sees of a run: the plan before it, a progress line during it, a table after it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from gemma_ft.recipe.run_files import RunFiles
from gemma_ft.system import hardware
from gemma_ft.system.units import byte_size as gib
from gemma_ft.system.units import number, percent

SAMPLES_SHOWN = 3
LINES_WITHOUT_TERMINAL = 20


class Display:
    """Writes to one console; on something that is no terminal, plain lines instead of a moving bar."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.eval_loss: float | None = None
        self._bar: Progress | None = None
        self._task: Any = None
        self._total = 0

    def say(self, text: str) -> None:
        """One line, above the bar when it is there."""
        (self._bar.console if self._bar else self.console).print(text, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def preparing(self) -> Iterator[Callable[[int], None]]:
        """While rows are read and encoded: gives what takes the count of documents that have come, and shows their sum
        on a terminal.
        """
        come = 0
        with self.console.status("data") as status:

            def count(documents: int) -> None:
                nonlocal come
                come += documents
                status.update(f"data  {come:,} documents")

            yield count

    def plan(self, rows: Sequence[tuple[str, str]]) -> None:
        """Label and text of each fact about the run to come."""
        for label, text in rows:
            self.say(f"  {label:<10} {text}")

    def start(self, total_steps: int, done: int) -> None:
        """Show the progress of a run of `total_steps` that begins at `done`."""
        self._total = total_steps
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("train"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._bar.start()
            self._task = self._bar.add_task("train", total=total_steps, completed=done, figures="")

    def step(self, figures: dict[str, Any]) -> None:
        """Show the figures of an optimizer step."""
        parts = [
            f"loss {number(figures['loss'])}",
            f"{figures['tokens_per_second']:,.0f} tok/s",
            gib(hardware.peak_memory_bytes()),
        ]
        if self.eval_loss is not None:
            parts.insert(1, f"eval {self.eval_loss:.4f}")
        text, step = "  ".join(parts), figures["step"]
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=text)
        elif step == self._total or step % max(1, self._total // LINES_WITHOUT_TERMINAL) == 0:
            self.say(f"  step {step}/{self._total}  {text}")

    def stop(self) -> None:
        """Leave the bar as it is and give the terminal back."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def show_summary(console: Console, summary: dict[str, Any], run: RunFiles, report: Path | None) -> None:
    """The table at the end of a run: before and after, speed, memory, where things lie, and a few answers."""
    before, after = summary["eval_before"], summary["eval_after"]
    table = Table(title="What was learned", title_justify="left")
    table.add_column("held-out")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_row("exact match", percent(before["exact_match"]), percent(after["exact_match"]))
    table.add_row("loss per token", number(before["loss"]), number(after["loss"]))
    if "canary_loss" in summary:
        table.add_row("canary loss", number(summary["canary_base_loss"]), number(summary["canary_loss"]))
    console.print(table)
    facts = [
        ("steps", f"{summary['steps']:,}, {summary['tokens']:,} tokens in {summary['seconds']:.1f} s"),
        ("speed", f"{summary['tokens_per_second']:,.0f} tokens/s"),
        ("peak", gib(summary["peak_bytes"])),
        ("result", str(run.root / summary["result"])),
        ("metrics", str(run.metrics)),
        ("summary", str(run.summary)),
    ]
    facts += [("report", str(report))] if report is not None else []
    facts += [("warning", summary["forgetting_note"])] if summary["forgetting_note"] else []
    for label, text in facts:
        console.print(f"  {label:<8} {text}", markup=False, highlight=False, soft_wrap=True)
    for sample in summary["samples"][:SAMPLES_SHOWN]:
        console.print(f"\n[bold]{escape(sample['prompt'])}[/bold]", highlight=False, soft_wrap=True)
        for label, style in (("before", "yellow"), ("after", "green")):
            console.print(f"  {label:<6} [{style}]{escape(sample[label])}[/{style}]", highlight=False, soft_wrap=True)
