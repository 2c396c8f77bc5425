"""The page of one run: what was gained, how it went, what it answers, what it was made of, how to go on."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from gemma_ft.data.pack.arrange import DataStats
from gemma_ft.errors import UserError
from gemma_ft.system.files import replace_text
from gemma_ft.system.units import NOTHING, byte_size, count, duration, is_figure, number, percent
from gemma_ft.ui.metric_text import LOSS_PER, SCORES, score_of, with_interval
from gemma_ft.ui.pages.blocks import (
    GENERATOR,
    Block,
    Cards,
    Code,
    Note,
    Picture,
    Pictures,
    Sample,
    Section,
    Table,
    render,
)
from gemma_ft.ui.pages.curves import SMALL, Curve, Panel, curve_picture, histogram_picture
from gemma_ft.ui.pages.facts import RunFacts, read_run
from gemma_ft.ui.pages.preferences import preference_blocks
from gemma_ft.ui.pages.results import certificate_blocks, evaluation_blocks

SAMPLES_SHOWN = 10


def write_report(root: Path, out: Path) -> Path:
    """Write the page of the run in `root` to `out`, whole or not at all; returns `out`.

    Raises: UserError when there is no run in `root`, or `out` is a file that is no report.
    """
    run = read_run(root)
    kind = [run.settings[key] for key in ("model.preset", "strategy") if key in run.settings]
    subtitle = " · ".join([*kind, str(root)])
    return write_page(out, render(f"Run {run.name}", subtitle, sections_of(run)))


def write_page(out: Path, html: str) -> Path:
    """Write a page where none, or an older one, is. Raises: UserError when something else is there."""
    try:
        if out.exists() and not is_page(out):
            raise UserError(f"{out}: is there and is no report; name another file with --out")
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_text(out, html)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}; name another file with --out") from error
    return out


def is_page(path: Path) -> bool:
    """Whether a file is a page that was made here."""
    head = path.read_bytes()[:1000].decode("utf-8", errors="replace") if path.is_file() else ""
    return f'content="{GENERATOR.split()[0]} ' in head


def sections_of(run: RunFacts) -> list[Section]:
    """The sections of a run's page, in reading order."""
    return [
        Section("", [*headline(run), *(Note(text) for text in run.notes)]),
        Section("Training", _curve_blocks(run)),
        Section("Gained and forgotten", _forgetting_blocks(run)),
        Section("Answers before and after", _sample_blocks(run)),
        Section("Answers on the way", _progress_blocks(run)),
        Section("Evaluation", evaluation_blocks(run.eval_results)),
        Section("Merge certificate", certificate_blocks(run.certificate)),
        Section("Data", _data_blocks(run)),
        Section("Recipe", [Code(run.recipe_text.rstrip())]),
        Section("Environment", _environment_blocks(run)),
        Section("How to go on", [Code(commands(run))]),
    ]


def headline(run: RunFacts) -> list[Block]:
    """The figures a reader looks for first, and the warning that must not be missed."""
    figure = run.figure
    if not run.finished:
        last = run.curves["loss"][-1] if run.curves["loss"] else (None, None)
        return [Cards([("steps so far", count(last[0]), ""), ("training loss", number(last[1]), "")])]
    cards = [
        ("held-out loss", number(figure("eval_after", "loss")), f"before: {number(figure('eval_before', 'loss'))}"),
        *(
            (label, score_of(figure("eval_after"), name, written), f"before: {written(figure('eval_before', name))}")
            for name, label, written in SCORES[run.rows]
        ),
    ]
    if "win_rate" in run.summary:
        judge, controlled = figure("win_rate", "judge"), percent(figure("win_rate", "length_controlled"))
        cards.append(("better answers", with_interval(figure("win_rate")), f"{judge}; at equal lengths: {controlled}"))
    if "canary_loss" in run.summary:
        remark = f"canary loss: {number(figure('canary_base_loss'))} → {number(figure('canary_loss'))}"
        cards.append(("forgetting", signed(figure("forgetting")), remark))
    cards += [
        ("steps", count(figure("steps")), f"{count(figure('tokens'))} tokens in {duration(figure('seconds'))}"),
        ("speed", f"{count(figure('tokens_per_second'))} tokens/s", str(figure("device") or "")),
        ("peak memory", byte_size(figure("peak_bytes")), ""),
    ]
    note = figure("forgetting_note")
    return [Cards(cards), *([Note(str(note), warning=True)] if note else [])]


def signed(value: Any) -> str:
    """A difference with its sign."""
    return f"{value:+.4f}" if is_figure(value) else NOTHING


def _curve_blocks(run: RunFacts) -> list[Block]:
    loss = [Curve("training", run.curves["loss"]), Curve("held-out", run.evals["eval_loss"], "points", 1)]
    title = LOSS_PER[run.rows].capitalize()
    wide = curve_picture(Panel(title, loss, logarithmic=True))
    panels = [
        Panel("Learning rate", [Curve("", run.curves["learning_rate"], "line")]),
        Panel("Gradient norm", [Curve("", run.curves["grad_norm"])], logarithmic=True),
        Panel("Tokens per second", [Curve("", run.curves["tokens_per_second"])]),
    ]
    drawn = [(curve_picture(one, width=SMALL, height=2.3), f"{one.title} by step") for one in panels]
    small = [Picture(uri, alt) for uri, alt in drawn if uri is not None]
    blocks: list[Block] = [Picture(wide, f"{title} by step")] if wide is not None else []
    blocks += preference_blocks(run)
    return [*blocks, Pictures(small)] if small else blocks


def _forgetting_blocks(run: RunFacts) -> list[Block]:
    if "canary_loss" not in run.summary:
        return []
    figure = run.figure
    names, head = ("held-out rows", "canary rows"), LOSS_PER["answers"]
    if run.rows != "answers":  # two losses of different kinds
        held_out, canary = names
        names, head = (f"{held_out}, {LOSS_PER[run.rows]}", f"{canary}, {head}"), "loss"
    found = [
        (names[0], figure("eval_before", "loss"), figure("eval_after", "loss"), figure("gain"), "gain"),
        (names[1], figure("canary_base_loss"), figure("canary_loss"), figure("forgetting"), "forgetting"),
    ]
    rows = [
        [name, number(first), number(last), f"{word} {signed(change)}"] for name, first, last, change, word in found
    ]
    blocks: list[Block] = [
        Table([head, "base", "trained", ""], rows),
        Note("Canary rows are general: what they lose shows what was forgotten. The base is the model, adapter off."),
    ]
    if len(run.evals["canary_loss"]) > 2:
        curves = [
            Curve("trained", run.evals["canary_loss"], "points", 1),
            Curve("base", run.evals["canary_base_loss"], "dashed", 0),
        ]
        uri = curve_picture(Panel("Canary loss per token", curves), height=2.3)
        blocks += [Picture(uri, "Canary loss by step")] if uri is not None else []
    return blocks


def _sample_blocks(run: RunFacts) -> list[Block]:
    samples = run.figure("samples")
    return [
        Sample(
            str(one.get("prompt", "")),
            str(one.get("expected", "")),
            [("before", str(one.get("before", ""))), ("after", str(one.get("after", "")))],
        )
        for one in (samples if isinstance(samples, list) else [])[:SAMPLES_SHOWN]
        if isinstance(one, dict)
    ]


def _progress_blocks(run: RunFacts) -> list[Block]:
    """What each question was answered at each step; nothing when only the ends are known, which stand above."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for line in run.samples:
        by_prompt.setdefault(line["prompt"], []).append(line)
    if run.finished and all(len(lines) <= 2 for lines in by_prompt.values()):
        return []
    blocks: list[Block] = []
    for prompt, lines in by_prompt.items():
        answers = [(f"step {one.get('step')}", str(one.get("answer", ""))) for one in lines]
        blocks.append(Sample(prompt, str(lines[0].get("expected", "")), answers))
    return blocks


def _data_blocks(run: RunFacts) -> list[Block]:
    data, lengths = run.figure("data"), run.figure("lengths")
    if not isinstance(data, dict):
        return []
    counts = {one.name: data[one.name] for one in fields(DataStats) if _is_count(data.get(one.name))}
    blocks: list[Block] = [Note(DataStats(run.rows, **counts).describe())]
    if isinstance(lengths, dict) and isinstance(documents := lengths.get("documents"), list):
        width = lengths.get("bin_tokens")
        if documents and isinstance(width, int) and all(is_figure(one) for one in documents):
            uri = histogram_picture(documents, width, title="Sequences by length", x_label="tokens")
            blocks.append(Picture(uri, "How many training sequences have how many tokens"))
    return blocks


def _is_count(value: Any) -> bool:
    """Whether a figure of DataStats is a number, or numbers by name."""
    return isinstance(value, int) or (isinstance(value, dict) and all(isinstance(one, int) for one in value.values()))


def _environment_blocks(run: RunFacts) -> list[Block]:
    versions = run.figure("versions")
    rows = [["device", str(run.figure("device") or NOTHING)]]
    rows += [[str(name), str(version)] for name, version in versions.items()] if isinstance(versions, dict) else []
    return [Table(["", ""], rows, prose=True)] if run.finished else []


def commands(run: RunFacts) -> str:
    """What a user may do next, as lines for a shell."""
    root = shlex.quote(str(run.files.root))
    if not run.finished:
        return f"gemma-ft train {shlex.quote(str(run.files.recipe))} --resume"
    whole = run.settings.get("strategy") == "full"
    merge = "" if whole else f"gemma-ft merge {root} --out {root}/merged\n"
    return (
        f"gemma-ft chat {root}\n"
        f"gemma-ft eval {root}\n"
        f"{merge}"
        f"gemma-ft export {root} --to gguf --out {shlex.quote(run.name)}.gguf\n"
        f"gemma-ft serve {root} --host 127.0.0.1 --port 8000\n"
        f"gemma-ft report {root}"
    )
