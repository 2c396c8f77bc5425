"""instruction, input (may be missing), output; or instruction, instances: [{input, output}]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_ft.data.conversation import Item, Turn, kind_of
from gemma_ft.data.read.columns import FieldError
from gemma_ft.data.read.fields import Fields, telling
from gemma_ft.data.read.row_format import Columns, Format, RowFields, conversation, system_of, text_in
from gemma_ft.data.read.verdicts import labelled

PLACE = 3


def readings(row: RowFields) -> list[str]:
    """See Format."""
    answer = next((name for name in ("output", "instances") if name in row), None)
    return [f"instruction, {answer}"] if "instruction" in row and answer else []


def parse(where: str, fields: Fields, columns: Columns) -> list[Item]:
    """A conversation for each instance, or the one that the row is."""
    instruction = text_in(fields, "instruction")
    pairs: Any = fields["instances"] if "instances" in fields and "output" not in fields else [fields]
    if not isinstance(pairs, list) or not pairs:
        raise FieldError(f"'instances' is {kind_of(pairs) if pairs else 'empty'}, expected a list of input and output")
    items: list[Item] = []
    for number, pair in enumerate(pairs):
        if not isinstance(pair, Mapping):
            raise FieldError(f"'instances[{number}]' is {kind_of(pair)}, expected an object")
        given = text_in(pair, "input", optional=True)
        question = f"{instruction}\n\n{given}" if given.strip() else instruction
        turns = [*system_of(fields, columns), Turn("user", question), Turn("assistant", text_in(pair, "output"))]
        items.append(conversation(where, turns))
        if pair is not fields:
            left = telling(pair, pair.keys() - {"input", "output"})
            fields.passed_over += [f"instances[].{name}" for name in sorted(left)]
    return items


def answer_field(row: RowFields) -> str | None:
    """See Format."""
    return "output" if "instruction" in row and "instances" not in row else None


FORMAT = Format(readings=readings, parse=parse, answer_field=answer_field, labelled=labelled(parse, last=True))
