"""What the pieces of a data set hold, counted without a loop over tokens or examples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy

from gemma_ft.data.encode.documents import Documents, Part
from gemma_ft.data.encode.tokenizer import ControlIds
from gemma_ft.data.pack.examples import Examples, piece_tokens
from gemma_ft.system.limits import IGNORE


@dataclass(frozen=True)
class PieceCounts:
    """Figures of each piece of all examples, one example after the other: arrays [P]. The BOS that stands in front of a
    piece which does not begin with its document is counted.
    """

    pieces: Any  # int64 [P, 3]: document, start, end
    example: Any  # its number, from 0
    place: Any  # in the example, from 0
    tokens: Any
    trained: Any
    bos: Any  # BOS tokens
    begins_with_bos: Any  # bool
    first_trained: Any  # bool: its first token would be predicted from the document before
    mismatched: Any  # labels that are not their own token
    turns: Any  # <start_of_turn> tokens
    ends: Any  # trained <end_of_turn> tokens
    open_ends: Any  # <end_of_turn> tokens that are not trained, though the token before is


def count_pieces(examples: Examples, control: ControlIds) -> PieceCounts:
    """The figures of all pieces, one part of the documents at a time: what is held for it has the size of a part."""
    pieces, example = examples.in_order()
    found: dict[str, Any] = {}
    for part, chosen, rows in by_part(examples.documents, pieces[:, 0]):
        for name, values in _counted(part, rows, pieces[chosen, 1], pieces[chosen, 2], control).items():
            found.setdefault(name, numpy.zeros(len(pieces), values.dtype))[chosen] = values
    place = numpy.arange(len(pieces)) - numpy.searchsorted(example, example)
    return PieceCounts(pieces, example, place, piece_tokens(pieces), **found)


def by_part(documents: Documents, numbers: Any) -> Iterator[tuple[Part, Any, Any]]:
    """(part, which of `numbers` lie in it, their rows in it) for each part that holds any; `numbers`: of documents."""
    starts = numpy.cumsum([0, *(len(part.table) for part in documents.parts)])
    order = numpy.argsort(numbers, kind="stable")
    bounds = numpy.searchsorted(numbers[order], starts)
    for number, part in enumerate(documents.parts):
        chosen = order[bounds[number] : bounds[number + 1]]
        if len(chosen):
            yield part, chosen, numbers[chosen] - starts[number]


def trained_between(documents: Documents, pieces: Any) -> Any:
    """Trained tokens of each piece (document, start, end) by the labels alone: int64 [pieces]."""
    found = numpy.zeros(len(pieces), numpy.int64)
    for part, chosen, rows in by_part(documents, pieces[:, 0]):
        (labels, _), (first, last) = part.labels, _bounds(part, rows, pieces[chosen, 1], pieces[chosen, 2])
        found[chosen] = _between(labels != IGNORE, first, last)
    return found


def _counted(part: Part, rows: Any, starts: Any, ends: Any, control: ControlIds) -> dict[str, Any]:
    """All of PieceCounts that has to be read from the tokens, of pieces of one part."""
    (ids, _), (labels, _) = part.ids, part.labels
    first, last = _bounds(part, rows, starts, ends)
    trained = labels != IGNORE
    turn_ends = ids == control.end_of_turn
    open_ends = turn_ends & ~trained
    open_ends[1:] &= trained[:-1]
    later = starts > 0  # a BOS is put in front
    return {
        "trained": _between(trained, first, last),
        "bos": _between(ids == control.bos, first, last) + later,
        "begins_with_bos": later | (ids[first] == control.bos),
        "first_trained": ~later & trained[first],
        "mismatched": _between(trained & (labels != ids), first, last),
        "turns": _between(ids == control.start_of_turn, first, last),
        "ends": _between(trained & turn_ends, first, last),
        # the token before the first is none of the piece: it has BOS there, or nothing
        "open_ends": _between(open_ends, numpy.minimum(first + 1, last), last),
    }


def _bounds(part: Part, rows: Any, starts: Any, ends: Any) -> tuple[Any, Any]:
    """Where pieces begin and end among all tokens of a part."""
    at = part.ids[1].astype(numpy.int64)
    return at[rows] + starts, numpy.minimum(at[rows] + ends, at[rows + 1])


def _between(marks: Any, first: Any, last: Any) -> Any:
    """How many marks are set from each first to each last: int64."""
    sums = numpy.zeros(len(marks) + 1, numpy.int64)
    numpy.cumsum(marks, out=sums[1:])
    return sums[last] - sums[first]
