"""prompt, chosen, rejected, or two whole chats: chosen, rejected. The chosen one is trained.

Where pairs are wanted, also other ways to hold answers that were compared (compared.py).
"""

from __future__ import annotations

from gemma_ft.data.conversation import Item, Pair, Turn
from gemma_ft.data.read.columns import FieldError
from gemma_ft.data.read.compared import check_beside, compared, compared_fields
from gemma_ft.data.read.fields import Fields
from gemma_ft.data.read.pairs import pair_of, split_head
from gemma_ft.data.read.row_format import Columns, Format, RowFields, after, conversation, part_of, system_of
from gemma_ft.data.read.turns import asked, said

PLACE = 6


def parse(where: str, fields: Fields, columns: Columns) -> list[Item]:
    """The prompt with its chosen answer; the rejected one is held to the same rules, and not trained."""
    prompt, chosen, rejected = _parts(fields, columns)
    if prompt and [turn.content.strip() for turn in chosen] == [turn.content.strip() for turn in rejected]:
        raise FieldError("'chosen' and 'rejected' are the same answer")
    system = system_of(fields, columns)
    chats = [conversation(where, after(system, prompt + turns)) for turns in (chosen, rejected)]
    return list(chats[:1])


def pairs(where: str, fields: Fields, columns: Columns) -> list[Pair]:
    """The better answer with each worse one, behind their prompt; of whole chats it is what they have in common."""
    found = compared(fields, columns)
    made = []
    for name, turns, margin in found.worse:
        names = (found.better[0], name)
        if found.prompt is None:
            prompt, better, worse = split_head(found.better[1], turns, names)
            check_beside(fields, columns, prompt, names)
        else:
            prompt, better, worse = found.prompt, found.better[1], turns
        prompt = after(system_of(fields, columns), prompt)
        made.append(pair_of(where, prompt, better, worse, margin=margin, names=names))
    return made


def _parts(fields: Fields, columns: Columns) -> tuple[list[Turn], list[Turn], list[Turn]]:
    """(prompt, chosen, rejected); of two whole chats the prompt is empty."""
    chosen, rejected = (said(*part_of(fields, columns, key), "assistant", fields) for key in ("chosen", "rejected"))
    if chosen[0].role == "assistant":
        if "prompt" not in columns and "prompt" not in fields:
            raise FieldError(
                f"no field 'prompt'; the row has {', '.join(map(str, fields))}; map it with data.columns.prompt, or "
                "give whole chats, as lists of turns, in 'chosen' and 'rejected'"
            )
        return asked(said(*part_of(fields, columns, "prompt"), "user", fields)), chosen, rejected
    # whole chats; a prompt beside them is often their first question
    beside = fields.look("prompt")
    if isinstance(beside, str) and any(turn.content.strip() == beside.strip() for turn in chosen):
        fields.get("prompt")
    return [], chosen, rejected


def has_both(row: RowFields) -> bool:
    """Whether a row has a chosen and a rejected answer."""
    return "chosen" in row and "rejected" in row


FORMAT = Format(
    readings=lambda row: ["chosen, rejected"] if has_both(row) else [],
    parse=parse,
    columns=frozenset(("prompt", "chosen", "rejected")),
    fits=lambda row, columns: has_both(row),
    pairs=pairs,
    pair_readings=lambda row: list(filter(None, [compared_fields(row)])),
)
