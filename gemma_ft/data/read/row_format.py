"""What a format of rows is, and the pieces that formats read their rows with. Each has a file of its own in formats/.

Nothing is rendered that is not text: nulls and numbers as content are refused, with the place.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_ft.data.conversation import Conversation, Item, Pair, Turn, order_fault, text_fault
from gemma_ft.data.read import formats as folder
from gemma_ft.data.read.columns import BESIDE, FieldError, fill, fill_text, fill_value
from gemma_ft.data.read.fields import Fields
from gemma_ft.data.read.turns import SPEAKERS, keys_of, text_of, turns_in

Columns = Mapping[str, str]
RowFields = Mapping[str, Any]
LIST_FIELDS = ("messages", "conversations", "conversation")  # what a list of turns is called
LAST = 1000  # the PLACE of a format whose file names none


@dataclass(frozen=True)
class Format:
    """How rows of one format are known, and what becomes of them. Its name is that of its file.

    readings: of a row's fields, what they are for each way in which the row can be of this format ("question, answer").
    parse: the place, the fields and data.columns of a row -> its items; raises FieldError. columns: the keys of
    data.columns that may name its fields. fits: of a row and data.columns, whether it is of this one of several formats
    that have those columns. answer_field: what the answer to a row's question is called where rows are asked, or would
    be called; None for a row without a question of this format. documents: whether rows become plain texts.
    """

    readings: Callable[[RowFields], list[str]]
    parse: Callable[[str, Fields, Columns], list[Item]]
    columns: frozenset[str] = frozenset()
    fits: Callable[[RowFields, Columns], bool] = lambda row, columns: True
    answer_field: Callable[[RowFields], str | None] = lambda row: None
    documents: bool = False
    pairs: Callable[[str, Fields, Columns], list[Pair]] | None = None
    pair_readings: Callable[[RowFields], list[str]] = lambda row: []
    labelled: Callable[[str, Fields, Columns], list[Conversation]] | None = None


@functools.cache
def formats() -> dict[str, Format]:
    """The formats by their names, in the order in which they are told: by the PLACE in their files."""
    names = [module.name for module in pkgutil.iter_modules(folder.__path__)]
    modules = {name: importlib.import_module(f"{folder.__name__}.{name}") for name in names}
    order = sorted(names, key=lambda name: (getattr(modules[name], "PLACE", LAST), name))
    return {name: modules[name].FORMAT for name in order}


def text_in(fields: RowFields, name: str, *, optional: bool = False) -> str:
    """The text of a field. `optional`: "" where it is absent or null. Raises: FieldError."""
    if name not in fields:
        if optional:
            return ""
        raise FieldError(f"no field {name!r}; the row has {', '.join(map(str, fields)) or 'none'}")
    if optional and fields[name] is None:  # tables fill absent cells with null
        return ""
    fault = text_fault(fields[name])
    if fault:
        raise FieldError(f"{name!r} {fault}")
    return str(fields[name])


def part_of(fields: Fields, columns: Columns, key: str, names: Sequence[str] = ()) -> tuple[Any, str]:
    """(value, its name) of what `columns` map to `key`; where they do not, of the first of `names` that is there.

    Raises: FieldError.
    """
    if key in columns:
        return fill(columns[key], fields)
    names = names or (key,)
    name = next((name for name in names if name in fields), names[0])
    if name not in fields:
        cure = f"; map it with data.columns.{key}" if set(columns) - BESIDE else ""
        raise FieldError(f"no field {name!r}; the row has {', '.join(map(str, fields)) or 'none'}{cure}")
    return fields[name], name


def system_of(fields: Fields, columns: Columns) -> list[Turn]:
    """The system turn that a row has beside its turns, if any. Raises: FieldError."""
    if "system" in columns:
        content = fill_text(columns["system"], fields)
    else:
        content = "" if fields.look("system") is None else text_of(fields["system"], "system", fields.chat)
    return [Turn("system", content)] if content.strip() else []


def after(system: list[Turn], turns: list[Turn]) -> list[Turn]:
    """Turns behind the system text that stands beside them; where they begin with one of their own it is the same.

    Raises: FieldError where it is another.
    """
    if not system or not turns or turns[0].role != "system":
        return system + turns
    if turns[0].content.strip() not in ("", system[0].content.strip()):
        raise FieldError("has a system turn, and another text beside the turns in 'system'; keep one of them")
    return system + turns[1:]


def list_readings(row: RowFields, keys: tuple[str, str]) -> list[str]:
    """The names of a row's lists whose turns have these keys."""
    return [name for name in LIST_FIELDS if keys_of(row.get(name)) == keys]


def list_fits(row: RowFields, columns: Columns, keys: tuple[str, str]) -> bool:
    """Whether the turns of the list that `columns` name have these keys."""
    try:
        return keys_of(fill_value(columns["messages"], row)) == keys
    except FieldError:
        return False


def dialog(fields: Fields, columns: Columns, keys: tuple[str, str]) -> list[Turn]:
    """The turns of a row's list, behind the system text beside it. Raises: FieldError."""
    system = system_of(fields, columns)
    if "messages" in columns:
        name, value = columns["messages"].strip(" {}"), fill_value(columns["messages"], fields)
        return after(system, turns_in(value, name, keys, fields))
    name = next((name for name in LIST_FIELDS if name in fields), LIST_FIELDS[SPEAKERS.index(keys)])
    if name not in fields:
        raise FieldError(f"no field {name!r}; the row has {', '.join(map(str, fields)) or 'none'}")
    return after(system, turns_in(fields[name], name, keys, fields))


def conversation(where: str, turns: list[Turn], left_out: int = 0) -> Conversation:
    """A conversation that can be trained. Raises: FieldError."""
    if not any(turn.role == "assistant" for turn in turns):
        raise FieldError("has no assistant turn, nothing to train on")
    fault = order_fault(turns)
    if fault:
        raise FieldError(fault)
    if not any(turn.train for turn in turns if turn.role == "assistant"):
        raise FieldError("has no assistant turn that is to be trained ('train' or 'weight' is off in all)")
    if turns[-1].role != "assistant":
        raise FieldError(f"turn {len(turns)}: the last turn must be the assistant's, got {turns[-1].role}")
    return Conversation(where, tuple(turns), left_out)
