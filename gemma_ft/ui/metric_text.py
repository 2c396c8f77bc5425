"""Metrics and their figures as they are usually written, for tables of a terminal and of a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gemma_ft.evaluate.metrics import METRICS
from gemma_ft.evaluate.reward import ACCURACY
from gemma_ft.system.row_kind import RowKind
from gemma_ft.system.units import NOTHING, number, percent

INTERVAL = {"value": "", "low": "_low", "high": "_high"}  # what is added to a score's name
LOSSES = ("loss", "perplexity")
LOSS_PER: Mapping[RowKind, str] = {"answers": "loss per token", "pairs": "loss per pair", "labelled": "loss per row"}
_ACCURACY = ("rewards/accuracies", "accuracy", percent)
_MARGIN = ("rewards/margins", "margin", number)
_CHOSEN = ("rewards/chosen", "reward, chosen answers", number)
_GOOD, _BAD = ("rewards/chosen", "reward, good answers", number), ("rewards/rejected", "reward, bad answers", number)
SCORES: Mapping[RowKind, tuple[tuple[str, str, Callable[[Any], str]], ...]] = {  # names in a summary, and as written
    "answers": (("exact_match", "exact match", percent),),
    "pairs": (_ACCURACY, _MARGIN, _CHOSEN),
    "labelled": (_GOOD, _BAD, _MARGIN),
}


def with_interval(share: Mapping[str, Any], written: Callable[[Any], str] = percent) -> str:
    """A share and, where it has one, its 95% interval."""
    low, high = share.get("low"), share.get("high")
    text = written(share.get("value"))
    return text if low is None or high is None else f"{text} ({written(low)} to {written(high)})"


def score_of(figures: Mapping[str, Any] | None, name: str, written: Callable[[Any], str]) -> str:
    """One of SCORES in the figures of a held-out score, with its interval where there is one."""
    found = figures or {}
    return with_interval({key: found.get(name + end) for key, end in INTERVAL.items()}, written)


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
