"""How long the documents of a data set are, as a histogram small enough for summary.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

BINS = 24
READ_AT_MOST = 10_000  # examples; more than that are sampled at equal distances


def length_histogram(examples: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
    """`bin_tokens` (width of a bin), `documents` (how many have 1 to w tokens, w + 1 to 2w, ...) of the examples read,
    `examples_read` of `examples`.
    """
    step = -(-len(examples) // READ_AT_MOST) or 1
    read = examples[::step]
    lengths = numpy.concatenate([numpy.bincount(one["document_ids"]) for one in read])
    width = max(1, -(-int(lengths.max()) // BINS))
    counts = numpy.bincount((lengths[lengths > 0] - 1) // width)
    return {
        "bin_tokens": width,
        "documents": counts.tolist(),
        "examples_read": len(read),
        "examples": len(examples),
    }
