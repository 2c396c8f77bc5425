"""A prepared data set in figures: what each source gives, how long documents are, what was cut off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from gemma_ft.data.encode.documents import Documents
from gemma_ft.data.pack.counts import PieceCounts, trained_between

BINS = 24
LONG = 2  # times the 99th percentile: what is longer shares the last bin, so that one book hides no chats


@dataclass(frozen=True)
class SourceFacts:
    """What one source gives to an epoch."""

    name: str
    rows: int
    documents: int  # sequences: conversations, and pieces of long documents
    tokens: int
    trained: int
    truncated: int  # rows of which tokens are cut off

    @property
    def share(self) -> float:
        """Trained tokens among all, 0 to 1."""
        return self.trained / max(self.tokens, 1)


@dataclass(frozen=True)
class Overview:
    """Figures of what is trained on, for those who look at it."""

    sources: Sequence[SourceFacts]
    lengths: Any  # tokens of each document that is trained on, before it was cut: int64
    shares: Any  # trained share of each piece, 0 to 1: float64
    cut_tokens: int  # of documents that are trained on in part
    cut_trained: int  # those of them that would be trained


@dataclass(frozen=True)
class Histogram:
    """How many values are 1 to w, w + 1 to 2 w, ...; the last bin also holds the `beyond` ones past it."""

    width: int
    counts: Sequence[int]
    beyond: int


def overview(documents: Documents, counts: PieceCounts) -> Overview:
    """The figures of pieces that are counted."""
    lengths = documents.column("tokens")
    used = numpy.unique(counts.pieces[:, 0])
    parts = numpy.unique(counts.pieces, axis=0)  # a document that is seen twice in an epoch is cut once
    kept = numpy.bincount(parts[:, 0], parts[:, 2] - parts[:, 1], len(documents)).astype(numpy.int64)
    cut_trained = documents.column("trained")[used].sum() - trained_between(documents, parts).sum()
    return Overview(
        sources=_sources(documents, counts, kept < lengths),
        lengths=lengths[used],
        shares=counts.trained / counts.tokens,
        cut_tokens=int((lengths - kept)[used].sum()),
        cut_trained=int(cut_trained),
    )


def histogram(values: Any) -> Histogram:
    """At most BINS bins of equal width for whole numbers from 1 on."""
    top = min(int(values.max()), int(LONG * numpy.percentile(values, 99)))
    width = max(1, -(-top // BINS))
    bins = -(-top // width)
    counts = numpy.bincount(numpy.minimum((values - 1) // width, bins - 1), minlength=bins)
    return Histogram(width, counts.tolist(), int((values > bins * width).sum()))


def wheres_of(documents: Documents) -> list[str]:
    """Where each document stands in its source."""
    return [part.where(offset) for part in documents.parts for offset in part.table.column("offset").to_pylist()]


def source_of(where: str) -> str:
    """The source that a place is in: "a.jsonl" of "a.jsonl:12"."""
    return where.rpartition(":")[0]


def _sources(documents: Documents, counts: PieceCounts, cut: Any) -> list[SourceFacts]:
    """In the order of their documents; one that gives nothing to train on is there, with zeros."""
    wheres = wheres_of(documents)
    names: dict[str, int] = {}
    source = numpy.array([names.setdefault(source_of(where), len(names)) for where in wheres], numpy.int64)
    rows: list[set[str]] = [set() for _ in names]
    truncated: list[set[str]] = [set() for _ in names]
    for number in numpy.unique(counts.pieces[:, 0]).tolist():
        rows[source[number]].add(wheres[number])
        if cut[number]:
            truncated[source[number]].add(wheres[number])
    of_piece = source[counts.pieces[:, 0]]
    documents_of, tokens, trained = (
        numpy.bincount(of_piece, values, len(names)).astype(numpy.int64).tolist()
        for values in (None, counts.tokens, counts.trained)
    )
    return [
        SourceFacts(name, len(rows[at]), documents_of[at], tokens[at], trained[at], len(truncated[at]))
        for name, at in names.items()
    ]
