"""Metrics and their figures as they are usually written, for tables of a terminal and of a page."""

from __future__ import annotations

from gemma_ft.evaluate.metrics import METRICS
from gemma_ft.evaluate.reward import ACCURACY
from gemma_ft.system.units import NOTHING

LOSSES = ("loss", "perplexity")


def label_of(metric: str) -> str:
    """A metric's name, with an arrow where less is better; a task's as its author wrote it."""
    if metric in LOSSES:
        return f"{metric} ↓"
    return metric.replace("_", " ") if metric in METRICS else metric


def notation(metric: str, value: float | None, signed: bool) -> str:
    """A metric's figure as it is usually written: percent, points, or plain; a difference with its sign."""
    if value is None:
        return NOTHING
    sign = "+" if signed else ""
    if metric == "perplexity":
        return f"{value:{sign}.3f}" if abs(value) < 1e4 else f"{value:{sign}.3g}"
    if metric == ACCURACY:
        return f"{100 * value:{sign}.1f}%"
    if metric in METRICS:
        top = METRICS[metric].top
        return f"{value:{sign}.1f}" if top == 100 else f"{100 * value:{sign}.1f}%"
    return f"{value:{sign}.4f}" if abs(value) < 1e4 else f"{value:{sign}.4g}"
