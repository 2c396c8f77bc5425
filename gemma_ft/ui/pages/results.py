"""What gemma-ft eval and gemma-ft merge found, as parts of a page."""

from __future__ import annotations

from typing import Any

from gemma_ft.export.card.run_record import figures_by_model, objects
from gemma_ft.system.units import NOTHING, count, is_figure
from gemma_ft.ui.metric_text import label_of, notation
from gemma_ft.ui.pages.blocks import Block, Note, Sample, Table

SAMPLES_SHOWN = 5


def evaluation_blocks(results: dict[str, Any] | None) -> list[Block]:
    """The tables of eval.json, a row for each metric and a column for each model or difference, and some answers."""
    figures = figures_by_model(results)
    if results is None or not figures:
        return []
    blocks: list[Block] = [Table(["", *figures, "rows"], _rows(figures, counted=True))]
    found = results.get("differences")
    differences: dict[str, dict[str, Any]] = {}
    for one in found if isinstance(found, list) else ():
        if isinstance(one, dict):
            differences.setdefault(f"{one.get('of')} − {one.get('minus')}", {})[str(one.get("metric"))] = one
    if differences:
        blocks.append(Table(["differences", *differences], _rows(differences, signed=True)))
    blocks.append(Note("In brackets 95% intervals by resampling rows; * excludes 0."))
    samples = results.get("samples")
    for one in (samples if isinstance(samples, list) else [])[:SAMPLES_SHOWN]:
        answers = objects(one, "answers", only=str)
        if answers:
            blocks.append(Sample(str(one.get("prompt", "")), str(one.get("expected", "")), list(answers.items())))
    return blocks


def interval(metric: str, figure: Any, *, signed: bool = False) -> str:
    """A figure of eval.json with its interval, in the metric's notation; a star at a difference that is no accident."""
    if not isinstance(figure, dict) or not is_figure(figure.get("value")):
        return NOTHING
    value = notation(metric, figure["value"], signed)
    low, high = figure.get("low"), figure.get("high")
    if not is_figure(low) or not is_figure(high):
        return value
    star = "*" if signed and (low > 0 or high < 0) else ""
    return f"{value}{star} [{notation(metric, low, signed)}, {notation(metric, high, signed)}]"


def _rows(columns: dict[str, dict[str, Any]], *, signed: bool = False, counted: bool = False) -> list[list[str]]:
    metrics = list(dict.fromkeys(metric for figures in columns.values() for metric in figures))
    rows = [
        [label_of(metric), *(interval(metric, figures.get(metric), signed=signed) for figures in columns.values())]
        for metric in metrics
    ]
    if counted:
        for row, metric in zip(rows, metrics, strict=True):
            asked = [objects(figures, metric, only=object).get("rows") for figures in columns.values()]
            row.append(count(next((number for number in asked if number), None)))
    return rows


def certificate_blocks(merge: dict[str, Any] | None) -> list[Block]:
    """What merge.json holds: how the merge was made, how far it is from the live model, and whether that passed."""
    if merge is None:
        return []
    how = f"policy {merge.get('policy', NOTHING)}, written as {merge.get('dtype', NOTHING)}"
    certificate = objects(merge, "certificate", only=object)
    if not certificate:
        return [Note(f"{how}; merged without a certificate.")]
    merged = {"merged": objects(certificate, "merged", only=object)}
    found = {**merged, **objects(certificate, "compared")}
    measures = list(dict.fromkeys(measure for figures in found.values() for measure in figures))
    rows = [
        [measure.replace("_", " "), *(short(figures.get(measure)) for figures in found.values())]
        for measure in measures
    ]
    limit = objects(certificate, "limit", only=object)
    passed = certificate.get("passed") is True
    verdict = (
        f"{'Passed' if passed else 'Did not pass'}: {str(limit.get('measure')).replace('_', ' ')} may be "
        f"{short(limit.get('at_most'))} at most ({limit.get('why')})."
    )
    source = f"{how}; {count(certificate.get('positions'))} tokens of {count(certificate.get('prompts'))} rows."
    names = [name.replace("_", " ") for name in found]
    return [Table(["distance from the live model", *names], rows), Note(f"{verdict}\n{source}", warning=not passed)]


def short(value: Any) -> str:
    """A figure of any size in three digits."""
    return f"{value:.3g}" if is_figure(value) else NOTHING
