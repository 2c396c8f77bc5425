"""prompt, completion; or question, answer: texts, or lists of turns."""

from __future__ import annotations

from collections.abc import Sequence

from gemma_ft.data.conversation import Item
from gemma_ft.data.read.fields import Fields
from gemma_ft.data.read.row_format import Columns, Format, RowFields, after, conversation, part_of, system_of
from gemma_ft.data.read.turns import asked, said
from gemma_ft.data.read.verdicts import labelled

PLACE = 4
PAIRS = (("prompt", "completion"), ("question", "answer"))


def parse(where: str, fields: Fields, columns: Columns) -> list[Item]:
    """One conversation."""
    names: Sequence[Sequence[str]] = tuple(zip(*PAIRS, strict=True))
    if not {"prompt", "completion"} & set(columns):  # a row that has half of a pair is complained of by the other half
        names = [(name,) for name in max(PAIRS, key=lambda names: sum(name in fields for name in names))]
    prompt, completion = (part_of(fields, columns, key, one) for key, one in zip(PAIRS[0], names, strict=True))
    turns = asked(said(*prompt, "user", fields)) + said(*completion, "assistant", fields)
    return [conversation(where, after(system_of(fields, columns), turns))]


def answer_field(row: RowFields) -> str | None:
    """See Format."""
    if "chosen" in row or any(question in row and answer in row for question, answer in PAIRS):
        return None
    return next((answer for question, answer in PAIRS if question in row), None)


FORMAT = Format(
    readings=lambda row: [f"{question}, {answer}" for question, answer in PAIRS if question in row and answer in row],
    parse=parse,
    columns=frozenset(PAIRS[0]),
    fits=lambda row, columns: not ("chosen" in row and "rejected" in row),  # those have a prompt too
    answer_field=answer_field,
    labelled=labelled(parse, last=False),
)
