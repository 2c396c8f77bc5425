"""text: a plain document, nothing in it is a turn."""

from __future__ import annotations

from gemma_ft.data.conversation import Item, PlainText
from gemma_ft.data.read.columns import fill_text
from gemma_ft.data.read.fields import Fields
from gemma_ft.data.read.row_format import Columns, Format, text_in

PLACE = 5


def parse(where: str, fields: Fields, columns: Columns) -> list[Item]:
    """One document."""
    return [PlainText(where, fill_text(columns["text"], fields) if "text" in columns else text_in(fields, "text"))]


FORMAT = Format(
    readings=lambda row: ["text"] if "text" in row else [],
    parse=parse,
    columns=frozenset(("text",)),
    documents=True,
)
