"""What is scraped stays what dashboards and alerts were made for: names, labels, help, kinds and values."""

from pathlib import Path

from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from gemma_ft.serve.metrics import CONTENT_TYPE, Metrics

# the exposition of the same events by the writer that this project had of its own
BEFORE = Path(__file__).with_name("metrics.txt").read_text(encoding="utf-8")


def counted() -> Metrics:
    metrics = Metrics(lambda: 2, lambda: 3)
    for route, status in (("/v1/models", "200"), ("/v1/models", "200"), ("other", "404")):
        metrics.requests.labels(route, status).inc()
    metrics.prompt_tokens.inc(12)
    metrics.answer_tokens.inc(3)
    metrics.answer_tokens.inc(0)
    metrics.cancelled.inc(1)
    for seconds in (0.01, 0.2, 700.0):  # on a bound, between two, above all
        metrics.first_token.observe(seconds)
    metrics.duration.labels("/v1/models").observe(0.03)
    metrics.duration.labels("other").observe(1.0)
    return metrics


def families_of(text: str) -> list[tuple[object, ...]]:
    """(name, kind, help, {(sample, labels): value}) of each family, in the order of the text."""
    return [
        (one.name, one.type, one.documentation, {(s.name, *sorted(s.labels.items())): s.value for s in one.samples})
        for one in text_string_to_metric_families(text)
    ]


def test_the_exposition_is_the_one_before() -> None:
    assert families_of(counted().text().decode()) == families_of(BEFORE)
    assert CONTENT_TYPE == "text/plain; version=0.0.4; charset=utf-8"


def test_no_line_says_more_than_before() -> None:
    """No time of creation, nothing of the process: as many lines, and the same heads in the same order."""
    lines, before = counted().text().decode().splitlines(), BEFORE.splitlines()
    assert len(lines) == len(before)
    assert [line for line in lines if line.startswith("#")] == [line for line in before if line.startswith("#")]


def test_servers_share_no_figure() -> None:
    """Neither with each other nor with what else in the process counts."""
    one, other = counted(), counted()
    one.prompt_tokens.inc(5)
    assert families_of(other.text().decode()) == families_of(BEFORE)
    assert not [family.name for family in REGISTRY.collect() if family.name.startswith("gemma_ft")]
