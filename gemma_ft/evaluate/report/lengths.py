"""How long the documents of a data set are, as a histogram small enough for summary.json."""

from __future__ import annotations

from typing import Any

import numpy

BINS = 24


def length_histogram(lengths: Any) -> dict[str, Any]:
    """Lengths of documents -> `bin_tokens` (w, the width of a bin), `documents` (how many have 1 to w tokens, w + 1 to
    2w, ...).

    All bins up to the longest one are there: unlike data.overview.histogram, it hides no outlier.
    """
    width = max(1, -(-int(lengths.max()) // BINS))
    return {"bin_tokens": width, "documents": numpy.bincount((lengths - 1) // width).tolist()}
