"""The checks that every example must pass before a run begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy

from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.pack.counts import PieceCounts


def broken_invariants(counts: PieceCounts, encoder: ChatEncoder) -> list[str]:
    """What is wrong with the examples whose pieces were counted, one line each: BOS not exactly once and first in a
    document, an answer whose terminator is not trained, a label that is not its own token, an example with nothing
    trained.
    """
    untrained = numpy.flatnonzero(numpy.bincount(counts.example, counts.trained) == 0).tolist()
    found = [(example, -1, 0, f"example {example + 1}: no token is trained") for example in untrained]
    for check, (wrong, text) in enumerate(_checks(counts, encoder)):
        for piece in numpy.flatnonzero(wrong).tolist():
            example, place = int(counts.example[piece]), int(counts.place[piece])
            line = f"example {example + 1}, document {place + 1}: {text(piece)}"
            found.append((example, place, check, line))
    faults = [line for *_, line in sorted(found)]
    if counts.turns.any() and not counts.ends.any():
        faults.append(f"no {encoder.format.end} is trained in any example: the model would never stop")
    return faults


def _checks(counts: PieceCounts, encoder: ChatEncoder) -> list[tuple[Any, Callable[[int], str]]]:
    """(which pieces are wrong: bool [P], what to say of one) for each check of a piece."""
    return [
        (
            (counts.bos != 1) | ~counts.begins_with_bos,
            lambda piece: f"{encoder.chat.bos} occurs {counts.bos[piece]} times, expected once, at the start",
        ),
        (
            counts.first_trained,
            lambda _: "the first token is trained, it would be predicted from the document before",
        ),
        (counts.mismatched > 0, lambda _: "a label differs from its token"),
        (counts.open_ends > 0, lambda _: f"an answer is trained without its {encoder.format.end}"),
    ]
