"""messages: [{role: system, user or assistant, content}], with a system turn or a `system` field beside the list."""

from __future__ import annotations

from gemma_ft.data.conversation import Item
from gemma_ft.data.read.fields import Fields
from gemma_ft.data.read.row_format import Columns, Format, conversation, dialog, list_fits, list_readings
from gemma_ft.data.read.turns import SPEAKERS
from gemma_ft.data.read.verdicts import labelled

PLACE = 1
KEYS = SPEAKERS[0]


def parse(where: str, fields: Fields, columns: Columns) -> list[Item]:
    """One conversation."""
    return [conversation(where, dialog(fields, columns, KEYS))]


FORMAT = Format(
    readings=lambda row: list_readings(row, KEYS),
    parse=parse,
    columns=frozenset(("messages",)),
    fits=lambda row, columns: list_fits(row, columns, KEYS),
    labelled=labelled(parse, last=True),
)
