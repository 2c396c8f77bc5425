"""The page of several runs: figures side by side, curves over each other, what their recipes differ in, answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gemma_ft.export.card.run_record import figures_by_model
from gemma_ft.system.units import NOTHING, byte_size, count, duration, number, percent
from gemma_ft.ui.metric_text import LOSS_PER, label_of
from gemma_ft.ui.pages.blocks import Block, Note, Picture, Sample, Section, Table, render
from gemma_ft.ui.pages.curves import Curve, Panel, curve_picture
from gemma_ft.ui.pages.facts import RunFacts, read_run
from gemma_ft.ui.pages.page import signed, write_page
from gemma_ft.ui.pages.results import interval

SAMPLES_SHOWN = 10
FIGURES: tuple[tuple[str, tuple[str, ...], Callable[[Any], str]], ...] = (
    ("held-out loss before", ("eval_before", "loss"), number),
    ("held-out loss", ("eval_after", "loss"), number),
    ("exact match before", ("eval_before", "exact_match"), percent),
    ("exact match", ("eval_after", "exact_match"), percent),
    ("accuracy of rewards before", ("eval_before", "rewards/accuracies"), percent),
    ("accuracy of rewards", ("eval_after", "rewards/accuracies"), percent),
    ("margin of rewards", ("eval_after", "rewards/margins"), number),
    ("better answers than before", ("win_rate", "value"), percent),
    ("gain", ("gain",), signed),
    ("forgetting (canary)", ("forgetting",), signed),
    ("training loss, last step", ("train_loss",), number),
    ("steps", ("steps",), count),
    ("tokens", ("tokens",), count),
    ("time in steps", ("seconds",), duration),
    ("tokens/s", ("tokens_per_second",), count),
    ("peak memory", ("peak_bytes",), byte_size),
    ("device", ("device",), lambda value: str(value or NOTHING)),
)


def write_comparison(roots: Sequence[Path], out: Path) -> Path:
    """Write the page that compares the runs in `roots` to `out`; returns `out`.

    Raises: UserError as for the page of one run.
    """
    runs = [read_run(root) for root in roots]
    names = _names(runs)
    notes = [Note(f"{name}: {text}") for name, run in zip(names, runs, strict=True) for text in run.notes]
    sections = [
        Section("", [_figures(runs, names), *notes]),
        Section("Curves", _curves(runs, names)),
        Section("What the recipes differ in", [_differences(runs, names)]),
        Section("Evaluation", _evaluations(runs, names)),
        Section("Answers", _samples(runs, names)),
    ]
    return write_page(out, render(f"{len(runs)} runs compared", ", ".join(names), sections))


def _names(runs: Sequence[RunFacts]) -> list[str]:
    """The directories' names; their paths where two are called the same."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.files.root) for run in runs]


def _figures(runs: Sequence[RunFacts], names: Sequence[str]) -> Block:
    rows = [[label, *(shown(run.figure(*keys)) for run in runs)] for label, keys, shown in FIGURES]
    return Table(["", *names], [row for row in rows if set(row[1:]) != {NOTHING}])


def _curves(runs: Sequence[RunFacts], names: Sequence[str]) -> list[Block]:
    """Each run in its own colour: losses in one picture, what they came from in another."""

    def panel(title: str, found: Callable[[RunFacts], Any], style: str, *, logarithmic: bool = False) -> Panel:
        pairs = enumerate(zip(runs, names, strict=True))
        return Panel(title, [Curve(name, found(run), style, place) for place, (run, name) in pairs], logarithmic)

    per = {LOSS_PER[run.rows] for run in runs}
    loss = per.pop() if len(per) == 1 else "loss"
    pictures = [
        (panel(f"Training {loss}", lambda run: run.curves["loss"], "noisy", logarithmic=True), 2.9),
        (panel(f"Held-out {loss}", lambda run: run.evals["eval_loss"], "points", logarithmic=True), 2.6),
        (panel("Learning rate", lambda run: run.curves["learning_rate"], "line"), 2.2),
        (panel("Canary loss per token", lambda run: run.evals["canary_loss"], "points"), 2.2),
    ]
    drawn = [(curve_picture(one, height=height), f"{one.title} of each run by step") for one, height in pictures]
    return [Picture(uri, alt) for uri, alt in drawn if uri is not None]


def _differences(runs: Sequence[RunFacts], names: Sequence[str]) -> Block:
    keys = sorted({key for run in runs for key in run.settings} - {"output_dir", "logging.run_name"})
    keys = [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]  # a block that one run lacks
    rows = [[key, *(run.settings.get(key, NOTHING) for run in runs)] for key in keys]
    different = [row for row in rows if len(set(row[1:])) > 1]
    if not different:
        return Note("In nothing but where they wrote.")
    return Table(["setting", *names], different, prose=True)


def _evaluations(runs: Sequence[RunFacts], names: Sequence[str]) -> list[Block]:
    """The metrics of each run's eval.json, for each of its models."""
    columns = {
        f"{name}: {model}": figures
        for run, name in zip(runs, names, strict=True)
        for model, figures in figures_by_model(run.eval_results).items()
    }
    metrics = list(dict.fromkeys(metric for figures in columns.values() for metric in figures))
    rows = [
        [column, *(interval(metric, figures.get(metric)) for metric in metrics)] for column, figures in columns.items()
    ]
    return [Table(["", *map(label_of, metrics)], rows)] if rows else []


def _samples(runs: Sequence[RunFacts], names: Sequence[str]) -> list[Block]:
    """The questions that more than one run was asked, with what each answered at its end."""
    asked: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for run, name in zip(runs, names, strict=True):
        found = run.figure("samples")
        for one in found if isinstance(found, list) else ():
            if isinstance(one, dict):
                entry = asked.setdefault(str(one.get("prompt")), (str(one.get("expected", "")), []))
                entry[1].append((name, str(one.get("after", ""))))
    shared = [(prompt, *rest) for prompt, rest in asked.items() if len(rest[1]) > 1][:SAMPLES_SHOWN]
    return [Sample(prompt, expected, answers) for prompt, expected, answers in shared]
