"""conversations: [{from: human, gpt, ..., value}], with a system turn or a `system` field beside the list.

An answer before the first question and a question after the last answer are left out and counted in `left_out`: such
data is cut from longer chats.
"""

from __future__ import annotations

from gemma_ft.data.conversation import Item
from gemma_ft.data.read.fields import Fields
from gemma_ft.data.read.row_format import Columns, Format, conversation, dialog, list_fits, list_readings
from gemma_ft.data.read.turns import SPEAKERS
from gemma_ft.data.read.verdicts import labelled

PLACE = 2
KEYS = SPEAKERS[1]


def parse(where: str, fields: Fields, columns: Columns) -> list[Item]:
    """One conversation."""
    turns = dialog(fields, columns, KEYS)
    system, turns = (turns[:1], turns[1:]) if turns and turns[0].role == "system" else ([], turns)
    whole = len(turns)
    if turns and turns[0].role == "assistant":
        turns = turns[1:]
    if turns and turns[-1].role == "user":
        turns = turns[:-1]
    return [conversation(where, system + turns, left_out=whole - len(turns))]


FORMAT = Format(
    readings=lambda row: list_readings(row, KEYS),
    parse=parse,
    columns=frozenset(("messages",)),
    fits=lambda row, columns: list_fits(row, columns, KEYS),
    labelled=labelled(parse, last=True),
)
