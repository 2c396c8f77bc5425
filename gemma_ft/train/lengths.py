"""How long the documents of a data set are, as a histogram small enough for summary.json."""

from __future__ import annotations

from typing import Any

import numpy

BINS = 24


def length_histogram(counts: Any) -> dict[str, Any]:
    """How many documents have 0, 1, 2, ... tokens -> `bin_tokens` (w, the width of a bin), `documents` (how many have
    1 to w tokens, w + 1 to 2w, ...).

    All bins up to the longest one are there: unlike data.overview.histogram, it hides no outlier.
    """
    longest = len(counts) - 1
    width = max(1, -(-longest // BINS))
    bins = numpy.pad(counts[1:], (0, -longest % width)).reshape(-1, width).sum(axis=1)
    return {"bin_tokens": width, "documents": bins.tolist()}
