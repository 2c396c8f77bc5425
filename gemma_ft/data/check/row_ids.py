"""Rows by the names that messages give them: "file.jsonl:12", the end of such a path, or 12 where one file is read."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence

import numpy

from gemma_ft.data.check.overview import source_of, wheres_of
from gemma_ft.data.encode.documents import Documents
from gemma_ft.data.pack.examples import Examples
from gemma_ft.errors import DataError

UNIT = "row "  # of sources that have no lines
SOURCES_NAMED = 3


def documents_at(
    examples: Examples, row_ids: Sequence[str], *, max_seq_len: int, held_out: Collection[str] = ()
) -> dict[str, list[int]]:
    """The place of each row -> the documents that it gave and that are trained on, in the order asked for. `held_out`:
    the places of rows that are kept from training.

    Raises: DataError with a line for each row that is not there, or not trained on, and why.
    """
    places: dict[str, list[int]] = {}
    for document, place in enumerate(wheres_of(examples.documents)):
        places.setdefault(place, []).append(document)
    sources = list(dict.fromkeys(map(source_of, places)))
    used = set(numpy.unique(examples.pieces[:, 0]).tolist())
    trained = {place: kept for place, given in places.items() if (kept := [one for one in given if one in used])}
    found: dict[str, list[int]] = {}
    faults: list[str] = []
    skipped = {place: why for part in examples.documents.parts for place, why in part.bad}
    for row_id in row_ids:
        where = _place(row_id, places, sources)
        bad = _place(row_id, skipped, list(dict.fromkeys(map(source_of, skipped))))
        if where is None and bad is not None:
            faults.append(f"{bad}: was skipped: {skipped[bad]}")
        elif where is None:
            faults.append(f"{row_id}: {_unknown(row_id, places, trained, held_out)}")
        elif where in trained:
            found[where] = trained[where]
        else:
            faults.append(f"{where}: {_untrained(where, places[where], examples.documents, max_seq_len, held_out)}")
    if faults:
        raise DataError("\n".join(faults))
    return found


def _place(row_id: str, places: Collection[str], sources: Sequence[str]) -> str | None:
    """The place that a user means, or None."""
    if row_id in places:
        return row_id
    candidates = [name for source in _sources_of(row_id, sources) for name in _names(source, row_id)]
    known = [name for name in candidates if name in places]
    return known[0] if len(known) == 1 else None


def _names(source: str, row_id: str) -> list[str]:
    number = row_id.rpartition(":")[2].strip().removeprefix(UNIT)
    return [f"{source}:{number}", f"{source}:{UNIT}{number}"]


def _sources_of(row_id: str, sources: Sequence[str]) -> list[str]:
    """The sources whose path, or end of a path, stands in front of a row's number; all where nothing does."""
    path = source_of(row_id).removeprefix("./")
    return [source for source in sources if not path or source == path or source.endswith(f"/{path}")]


def _unknown(row_id: str, places: Collection[str], trained: Collection[str], held_out: Collection[str]) -> str:
    """Why there is no such place, and which trained row is near it."""
    sources = list(dict.fromkeys(map(source_of, places)))
    meant = _sources_of(row_id, sources)
    if _place(row_id, held_out, list(dict.fromkeys(map(source_of, held_out)))):
        return "is held out, not trained on; name another row"
    if not meant:
        more = f", and {len(sources) - SOURCES_NAMED} more" if len(sources) > SOURCES_NAMED else ""
        return f"no such source; rows are read from {', '.join(sources[:SOURCES_NAMED])}{more}"
    if len(meant) > 1:
        return f"fits rows of {' and '.join(meant[:SOURCES_NAMED])}; write more of the path"
    source = meant[0]
    last = max(_number(where) for where in places if source_of(where) == source)
    numbers = sorted(_number(where) for where in trained if source_of(where) == source)
    wanted = _number(_names(source, row_id)[0])
    if wanted < 0:
        return f"a row is named by its number, such as {source}:{numbers[0] if numbers else 1}"
    at = bisect_left(numbers, wanted)
    near = [_names(source, str(number)) for number in numbers[max(at - 1, 0) : at + 1]]
    names = " and ".join(name for pair in near for name in pair if name in trained) or "none"
    if 0 < wanted < last:
        why = "gives nothing to train on: the line is blank, or its row was dropped (an empty question, answer or text)"
    else:
        why = f"is not among the rows that are read from {source}"
    return f"{why}; nearest: {names}"


def _number(where: str) -> int:
    """The number of a row in its source; -1 for what is none."""
    number = where.rpartition(":")[2].removeprefix(UNIT)
    return int(number) if number.isdecimal() else -1


def _untrained(
    where: str, numbers: Sequence[int], documents: Documents, max_seq_len: int, held_out: Collection[str]
) -> str:
    """Why a row that was read is in no example."""
    if where in held_out:
        return "is held out, not trained on; name another row"
    tokens = int(documents.column("tokens")[list(numbers)].max())
    if tokens > max_seq_len:
        return f"was dropped: its {tokens:,} tokens do not fit into data.max_seq_len {max_seq_len}; raise that"
    return "is not among the training rows: repeats, weight or max_rows of its source leave it out"
