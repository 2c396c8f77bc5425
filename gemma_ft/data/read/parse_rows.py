"""Rows -> conversations and documents, by the format that they have (formats/, detect.py).

What a row says in a field that its format did not read is told with its items (`unread`); where it changes what the
answer means, the row is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

from gemma_ft.data.conversation import Item, Pair, RowKind
from gemma_ft.data.read.bad_rows import BadRows
from gemma_ft.data.read.columns import FieldError, fill_weight
from gemma_ft.data.read.detect import check_format, detect_format
from gemma_ft.data.read.fields import Fields, says_something
from gemma_ft.data.read.pairs import unpaired
from gemma_ft.data.read.row_format import Columns, Format, formats
from gemma_ft.data.read.sources import Row
from gemma_ft.data.read.turns import refuse_media, refuse_tool_calls
from gemma_ft.data.read.verdicts import VERDICTS, verdict
from gemma_ft.errors import DataError
from gemma_ft.families.chat_template import TURNS, ChatTemplate

KINDLESS = {
    "pairs": "rows of the format {name} have one answer, and this objective compares two; give rows with prompt, "
    "chosen and rejected, or set objective.kind: kto for answers with a label",
    "labelled": "rows of the format {name} have no label, and no pair to take one from; give rows with prompt, "
    "completion and label (true or false)",
}


def parse_rows(
    rows: Sequence[Row],
    *,
    format: str = "auto",
    columns: Columns | None = None,
    trained: bool = True,
    chat: ChatTemplate = TURNS,
) -> list[Item]:
    """Conversations or documents, in the rows' order, out of rows of one format ("auto": detected). `trained`: whether
    their answers are, so that one which is said to be bad is refused. `chat`: as Fields has it.

    Raises: DataError listing the first five bad rows as `file:line: reason`; DataError for a bad format or columns.
    """
    check_format(format, columns or {})
    name = detect_format(rows, columns)[0] if format == "auto" else format
    check_format(name, columns or {})
    bad = BadRows()
    items = [item for row in rows for item in parse_row(row, name, columns or {}, bad, trained=trained, chat=chat)]
    bad.raise_if_any()
    return items


@overload
def parse_row(
    row: Row, format: str, columns: Columns, bad: BadRows, *,
    trained: bool = True, chat: ChatTemplate = TURNS, rows: Literal["answers", "labelled"] = "answers",
) -> list[Item]: ...  # fmt: skip


@overload
def parse_row(
    row: Row, format: str, columns: Columns, bad: BadRows, *,
    trained: bool = True, chat: ChatTemplate = TURNS, rows: Literal["pairs"],
) -> list[Pair]: ...  # fmt: skip


@overload
def parse_row(
    row: Row, format: str, columns: Columns, bad: BadRows, *,
    trained: bool = True, chat: ChatTemplate = TURNS, rows: RowKind,
) -> list[Item] | list[Pair]: ...  # fmt: skip


def parse_row(
    row: Row,
    format: str,
    columns: Columns,
    bad: BadRows,
    *,
    trained: bool = True,
    chat: ChatTemplate = TURNS,
    rows: RowKind = "answers",
) -> list[Item] | list[Pair]:
    """What one row of a format that is known becomes; nothing, and a line in `bad`, where it is none of that format.
    `trained`, `chat`: as of `parse_rows`. `rows`: what is wanted of it: its answers (Item), its pairs (Pair), or
    answers with a verdict (Conversation with a label; the halves of a pair are two).

    Raises: DataError where rows of the format are not of the wanted kind.
    """
    fields, known = Fields(row.fields, chat), formats()[format]
    read = _reader(known, format, rows)
    try:
        items: Any = read(row.where, fields, columns)
        changes: dict[str, Any] = {}
        if "weight" in columns:
            changes["weight"] = fill_weight(columns["weight"], fields)
        if rows == "answers" and trained and "label" in columns and not known.documents:
            _refuse_false(verdict(fields, columns), columns["label"])
        if unread := fields.unread():
            if not known.documents:
                refuse_media({name: fields.look(name) for name in unread})
            told = unread if known.documents or not trained else _told(fields, unread, rows)
            changes["unread"] = told
        if rows != "answers" and changes.pop("unread", ()):  # told once of a row
            items[0] = replace(items[0], unread=told)
        return [replace(item, **changes) for item in items] if changes else items
    except FieldError as fault:
        bad.add(row.where, str(fault))
        return []


def _reader(known: Format, name: str, rows: RowKind) -> Callable[[str, Fields, Columns], Sequence[Item | Pair]]:
    """What makes items of the wanted kind out of a row. Raises: DataError where the format has none of that kind."""
    if rows == "answers":
        return known.parse
    if rows == "pairs" and known.pairs is not None:
        return known.pairs
    if rows == "labelled" and known.labelled is not None:
        return known.labelled
    if rows == "labelled" and known.pairs is not None:
        pairs = known.pairs
        return lambda where, fields, columns: unpaired(pairs(where, fields, columns))
    raise DataError(f"data.format: {KINDLESS[rows].format(name=name)}")


def _told(fields: Fields, unread: tuple[str, ...], rows: RowKind) -> tuple[str, ...]:
    """What is to be told of the fields of a chat that were not read. Raises: FieldError for one without which the
    answer means something else.
    """
    refuse_tool_calls({name: fields.look(name) for name in unread})
    if rows != "answers":
        return unread
    if "rejected" in unread and not says_something(fields.look("chosen")):
        raise FieldError("has 'rejected', and no 'chosen'; name that with data.columns.chosen, or take 'rejected' out")
    for name in VERDICTS:
        if name in unread:
            _refuse_false(str(fields.look(name)).lower() != "false", name)
    return tuple(name for name in unread if name not in VERDICTS or str(fields.look(name)).lower() != "true")


def _refuse_false(good: bool, name: str) -> None:
    if not good:
        raise FieldError(
            f"{name!r} is false: the answer is a bad one, and would be trained as a good one; take such rows out"
        )
