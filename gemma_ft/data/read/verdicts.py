"""What rows say of their answers: whether one is good, by how much one is better than another, which one won."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from gemma_ft.data.conversation import Conversation, Item, kind_of
from gemma_ft.data.read.columns import FieldError, fill_value
from gemma_ft.data.read.fields import Fields

VERDICTS = ("label", "kto_tag")  # of unpaired preferences: whether the answer is a good one
SCORES = (  # of the chosen answer, of the rejected one
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"), ("chosen_reward", "rejected_reward"), ("reward_chosen", "reward_rejected"),
)  # fmt: skip
MOST = 1e6  # of a margin
TIE = "a tie, and none of the answers is the better one; take the row out"
Parse = Callable[[str, Fields, Mapping[str, str]], list[Item]]


def verdict_name(row: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """What says of a row whether its answer is a good one: a template, or a field; None where nothing does."""
    return columns.get("label") or next((name for name in VERDICTS if row.get(name) is not None), None)


def labelled(parse: Parse, *, last: bool) -> Callable[[str, Fields, Mapping[str, str]], list[Conversation]]:
    """Reads rows as `parse` does, and their verdict. `last`: it is of the last answer alone; those before it belong to
    the prompt.
    """

    def read(where: str, fields: Fields, columns: Mapping[str, str]) -> list[Conversation]:
        label = verdict(fields, columns)
        chats = [item for item in parse(where, fields, columns) if isinstance(item, Conversation)]
        return [replace(_last_alone(chat) if last else chat, label=label) for chat in chats]

    return read


def verdict(fields: Fields, columns: Mapping[str, str]) -> bool:
    """Whether a row's answer is a good one: true or false, 1 or 0, or these as text. Raises: FieldError."""
    name = verdict_name(fields, columns) if "label" in columns else next((n for n in VERDICTS if n in fields), None)
    if name is None:
        raise FieldError(
            f"no field 'label'; the row has {', '.join(map(str, fields)) or 'none'}; map it with data.columns.label"
        )
    value = fill_value(name, fields, "label") if "label" in columns else fields[name]
    known = {"true": True, "false": False, "1": True, "0": False}
    said = value.strip().lower() if isinstance(value, str) else str(value).lower().removesuffix(".0")
    if isinstance(value, bool | int | float | str) and said in known:
        return known[said]
    shown = repr(value) if isinstance(value, int | float | str) else kind_of(value)
    raise FieldError(f"the label {name!r} is {shown[:60]}, expected true or false, or 1 or 0")


def number_in(value: Any, name: str) -> float:
    """A number, as text too, which is all that a CSV file has. Raises: FieldError."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise FieldError(f"{name!r} is {kind_of(value)}, expected a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise FieldError(f"{name!r} is {str(value)[:60]!r}, expected a number")
    return number


def margin_of(fields: Fields, columns: Mapping[str, str]) -> float | None:
    """By how much the chosen answer is the better one, where a row says so: its margin, or the difference of two
    scores. Raises: FieldError for a tie, and where the rejected one has more.
    """
    if "margin" in columns:
        return _margin(fill_value(columns["margin"], fields, "margin"), columns["margin"].strip(" {}"))
    if fields.look("margin") is not None:
        return _margin(fields["margin"], "margin")
    if isinstance(fields.look("status"), str) and fields["status"] == "tie":  # argilla's pairs of Orca have it
        raise FieldError(f"'status' is 'tie': {TIE}")
    names = next((names for names in SCORES if all(fields.look(name) is not None for name in names)), None)
    if names is None or any(isinstance(fields.look(name), list) for name in names):
        return None
    more, less = (number_in(fields[name], name) for name in names)
    if more == less:
        raise FieldError(f"{names[0]!r} and {names[1]!r} are both {more:g}: {TIE}")
    if more < less:
        raise FieldError(
            f"{names[0]!r} is {more:g}, and {names[1]!r} is {less:g}: the rejected answer would be the better one; "
            "mend the row, or name its margin with data.columns.margin"
        )
    return min(more - less, MOST)


def _margin(value: Any, name: str) -> float:
    margin = number_in(value, name)
    if not 0 <= margin <= MOST:
        raise FieldError(f"the margin {name!r} is {margin:g}, expected 0 to {MOST:g}")
    return margin


def _last_alone(chat: Conversation) -> Conversation:
    *before, last = chat.turns
    if not last.train:
        raise FieldError("the last answer, which the label is of, is not to be trained ('train' or 'weight' is off)")
    return replace(chat, turns=(*(replace(turn, train=turn.role != "assistant") for turn in before), last))
