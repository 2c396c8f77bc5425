"""Figures of a server in Prometheus' text format, version 0.0.4: counted by prometheus_client.

Source: prometheus.io/docs/instrumenting/exposition_formats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

__all__ = ["CONTENT_TYPE", "SECONDS", "Metrics"]
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
CREATED = "_created"  # suffix of the time since when something is counted


class Metrics(Collector):
    """All figures of one server. They are in a registry of their own: two servers in a process share none, and nothing
    is told of the process itself.
    """

    def __init__(self, active: Callable[[], int], waiting: Callable[[], int]) -> None:
        self._registry = own = CollectorRegistry()
        self.requests = Counter("gemma_ft_requests_total", "Answered HTTP requests.", ("route", "status"), registry=own)
        self.prompt_tokens = Counter("gemma_ft_prompt_tokens_total", "Tokens of accepted prompts.", registry=own)
        self.answer_tokens = Counter("gemma_ft_generated_tokens_total", "Tokens generated.", registry=own)
        self.cancelled = Counter(
            "gemma_ft_cancelled_total", "Answers given up: the client left, or time was up.", registry=own
        )
        Gauge("gemma_ft_active", "Answers being generated.", registry=own).set_function(active)
        Gauge("gemma_ft_queue_length", "Answers waiting for a place.", registry=own).set_function(waiting)
        self.first_token = Histogram(
            "gemma_ft_time_to_first_token_seconds",
            "From acceptance to the first token.",
            registry=own,
            buckets=SECONDS,
        )
        self.duration = Histogram(
            "gemma_ft_request_seconds",
            "From the request's head to the end.",
            ("route",),
            registry=own,
            buckets=SECONDS,
        )

    def collect(self) -> Iterator[Metric]:
        """Every family as it is now, without the times of creation."""
        for family in self._registry.collect():
            family.samples = [_short_bound(one) for one in family.samples if not one.name.endswith(CREATED)]
            yield family

    def text(self) -> bytes:
        """Every figure as it is now, in the text format."""
        return generate_latest(self)


def _short_bound(sample: Sample) -> Sample:
    """A bucket's bound as `1`, not `1.0` as prometheus_client writes it: another text of a label is another series."""
    if "le" not in sample.labels:
        return sample
    return sample._replace(labels={**sample.labels, "le": sample.labels["le"].removesuffix(".0")})
