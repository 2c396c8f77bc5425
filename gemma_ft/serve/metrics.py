"""Figures of a server in Prometheus' text format, version 0.0.4. Written and read by the event loop's thread alone.

Source: prometheus.io/docs/instrumenting/exposition_formats.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Counter:
    """A number that only grows, one for each set of label values."""

    kind = "counter"

    def __init__(self, name: str, about: str, labels: Sequence[str] = ()) -> None:
        self.name, self.about, self.labels = name, about, tuple(labels)
        self.values: dict[tuple[str, ...], float] = {} if self.labels else {(): 0}

    def add(self, amount: float, *labels: str) -> None:
        """Grow by `amount`; the values of the labels in their order."""
        self.values[labels] = self.values.get(labels, 0) + amount

    def samples(self) -> list[str]:
        """Its lines, without the head."""
        return [f"{self.name}{_labels(self.labels, key)} {_number(value)}" for key, value in self.values.items()]


class Gauge:
    """A number that is read when it is asked for."""

    kind = "gauge"

    def __init__(self, name: str, about: str, read: Callable[[], float]) -> None:
        self.name, self.about, self.read = name, about, read

    def samples(self) -> list[str]:
        """Its line, without the head."""
        return [f"{self.name} {_number(self.read())}"]


class Histogram:
    """How many observed seconds were at most each bound, with their sum and count; for each set of label values."""

    kind = "histogram"

    def __init__(self, name: str, about: str, labels: Sequence[str] = (), bounds: Sequence[float] = SECONDS) -> None:
        self.name, self.about, self.labels, self.bounds = name, about, tuple(labels), tuple(bounds)
        self.values: dict[tuple[str, ...], list[float]] = {}  # a count for each bound and one above all, then the sum
        if not self.labels:
            self.values[()] = [0.0] * (len(self.bounds) + 2)

    def observe(self, seconds: float, *labels: str) -> None:
        """Count one duration; the values of the labels in their order."""
        row = self.values.setdefault(labels, [0.0] * (len(self.bounds) + 2))
        row[bisect_left(self.bounds, seconds)] += 1
        row[-1] += seconds

    def samples(self) -> list[str]:
        """Its lines, without the head; the counts are cumulative, as the format wants them."""
        lines = []
        for key, row in self.values.items():
            total = 0.0
            for bound, count in zip((*map(_number, self.bounds), "+Inf"), row, strict=False):
                total += count
                labels = _labels((*self.labels, "le"), (*key, bound))
                lines.append(f"{self.name}_bucket{labels} {_number(total)}")
            plain = _labels(self.labels, key)
            lines += [f"{self.name}_sum{plain} {_number(row[-1])}", f"{self.name}_count{plain} {_number(total)}"]
        return lines


class Metrics:
    """All figures of one server."""

    def __init__(self, active: Callable[[], int], waiting: Callable[[], int]) -> None:
        self.requests = Counter("gemma_ft_requests_total", "Answered HTTP requests.", ("route", "status"))
        self.prompt_tokens = Counter("gemma_ft_prompt_tokens_total", "Tokens of accepted prompts.")
        self.answer_tokens = Counter("gemma_ft_generated_tokens_total", "Tokens generated.")
        self.cancelled = Counter("gemma_ft_cancelled_total", "Answers given up: the client left, or time was up.")
        self.first_token = Histogram("gemma_ft_time_to_first_token_seconds", "From acceptance to the first token.")
        self.duration = Histogram("gemma_ft_request_seconds", "From the request's head to the end.", ("route",))
        self._all = (
            self.requests,
            self.prompt_tokens,
            self.answer_tokens,
            self.cancelled,
            Gauge("gemma_ft_active", "Answers being generated.", active),
            Gauge("gemma_ft_queue_length", "Answers waiting for a place.", waiting),
            self.first_token,
            self.duration,
        )

    def text(self) -> str:
        """Every figure as it is now, in the text format."""
        lines = []
        for one in self._all:
            lines += [f"# HELP {one.name} {one.about}", f"# TYPE {one.name} {one.kind}", *one.samples()]
        return "\n".join(lines) + "\n"


def _labels(names: Sequence[str], values: Sequence[str]) -> str:
    pairs = [f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True)]
    return "{" + ",".join(pairs) + "}" if pairs else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))
