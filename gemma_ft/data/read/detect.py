"""Which format rows have: told with its reason; two possible readings are refused, and what is none says why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gemma_ft.data.conversation import kind_of
from gemma_ft.data.read.columns import BESIDE, COLUMN_KEYS, FieldError, check_columns, fill_value
from gemma_ft.data.read.sources import Row
from gemma_ft.data.read.turns import SPEAKERS, TOOL_ROLES, TURN_ROLES, keys_of
from gemma_ft.errors import DataError

LIST_FIELDS = ("messages", "conversations", "conversation")
PAIRS = (("prompt", "completion"), ("question", "answer"))
SAMPLED_ROWS = 100
FORMAT_OF = dict(zip(SPEAKERS, ("messages", "sharegpt"), strict=True))
ONE_CHAT = 'write each chat as one row, {"messages": [{"role": "user", "content": "..."}, ...]}'
SINGLE = ("content", "text", "value", "message")  # what one message is called where each has a row of its own
SINGLE_ROLES = {*TURN_ROLES, *TOOL_ROLES, "prompter", "bot", "ai"}

Fields = Mapping[str, Any]


def detect_format(rows: Sequence[Row], columns: Mapping[str, str] | None = None) -> tuple[str, str]:
    """(format, one-line reason) for these rows: what most of the first rows have, or what `columns` names.

    Raises: DataError when no format fits, or more than one does.
    """
    columns = columns or {}
    check_columns(columns)
    if not rows:
        raise DataError("no rows to tell a format from")
    source, sample = rows[0].where.rpartition(":")[0], rows[:SAMPLED_ROWS]
    named = [key for key in COLUMN_KEYS if key in columns and key not in BESIDE]
    if "messages" in columns:
        kinds = [_list_format(_value_or_none(columns["messages"], row.fields)) for row in sample]
        kind = "sharegpt" if kinds.count("sharegpt") > kinds.count("messages") else "messages"
        return kind, f"data.columns names messages, whose turns are those of {kind}"
    sure = {"chosen": "preference", "rejected": "preference", "completion": "prompt_completion", "text": "text"}
    found = next((sure[key] for key in named if key in sure), None)
    if found is None and named:  # a prompt alone, which two formats have
        chosen = [all(name in row.fields for name in ("chosen", "rejected")) for row in sample]
        found = "preference" if 2 * sum(chosen) >= len(sample) else "prompt_completion"
    if found is not None:
        return found, f"data.columns names {_listed(named)}"
    votes: dict[tuple[str, str], int] = {}
    for row in sample:
        for reading in _readings(row.fields):
            votes[reading] = votes.get(reading, 0) + 1
    fitting = [reading for reading, count in votes.items() if 2 * count >= len(sample)] or list(votes)
    single = [row.fields for row in sample if _single_message(row.fields)]
    if len(fitting) == 1 and (fitting[0][0] != "text" or 2 * len(single) < len(sample)):
        return fitting[0][0], f"the rows have {fitting[0][1]}"
    if len(fitting) <= 1:
        raise DataError(f"{source}: {_reason_against(single[0] if fitting else rows[0].fields)}")
    both = " and ".join(f"{name} ({why})" for name, why in fitting)
    raise DataError(f"{source}: {both} fit; set data.format, or data.columns")


def _readings(fields: Fields) -> list[tuple[str, str]]:
    """Every (format, fields that say so) this row could be read as."""
    readings = [(kind, name) for name in LIST_FIELDS if (kind := _list_format(fields.get(name)))]
    if "instruction" in fields and ("output" in fields or "instances" in fields):
        readings.append(("alpaca", f"instruction, {'output' if 'output' in fields else 'instances'}"))
    readings += [("prompt_completion", f"{one}, {two}") for one, two in PAIRS if one in fields and two in fields]
    if "chosen" in fields and "rejected" in fields:
        readings.append(("preference", "chosen, rejected"))
    if "text" in fields:
        readings.append(("text", "text"))
    return readings


def _list_format(value: Any) -> str | None:
    """ "messages" or "sharegpt", by the keys of the first turn; None when this is no list of turns."""
    keys = keys_of(value)
    return None if keys is None else FORMAT_OF[keys]


def _value_or_none(template: str, fields: Fields) -> Any:
    try:
        return fill_value(template, fields)
    except FieldError:
        return None


def _reason_against(fields: Fields) -> str:
    """Why a row has no known format, and what to do."""
    names = ", ".join(map(str, fields)) or "none"
    if found := _export(fields):
        return f"the rows are {found}, which data.columns cannot map; {ONE_CHAT}"
    if found := _single_message(fields):
        return f"each row is one message ({found}); {ONE_CHAT}, or set data.format: text to learn each alone as text"
    name = next((name for name in LIST_FIELDS if name in fields), None)
    if name is None:
        return f"no known format has the fields {names}; map them with data.columns"
    return f"{name!r} {_no_turns(fields[name])}; {ONE_CHAT}"


def _export(fields: Fields) -> str | None:
    """Whose export a row comes from, where it is one of a whole account or of another service's tuning data."""
    if isinstance(fields.get("mapping"), dict):
        return "an export of ChatGPT (mapping: a tree of messages)"
    if isinstance(fields.get("chat_messages"), list):
        return "an export of Claude (chat_messages)"
    contents = fields.get("contents")
    if isinstance(contents, list) and contents and isinstance(contents[0], dict) and "parts" in contents[0]:
        return "of Gemini's API (contents with parts)"
    return None


def _single_message(fields: Fields) -> str | None:
    """The fields that make a row one message of a chat, as OpenAssistant's are published; None for any other row."""
    role, said = fields.get("role", fields.get("from")), next((name for name in SINGLE if name in fields), None)
    if not isinstance(role, str) or role.lower() not in SINGLE_ROLES or said is None:
        return None
    return f"{'role' if 'role' in fields else 'from'}, {said}"


def _no_turns(value: Any) -> str:
    """What stands where a list of turns is expected."""
    if isinstance(value, str):
        return "is text, and no list of turns in JSON"
    if not isinstance(value, list):
        return f"is {kind_of(value)}, expected a list of turns"
    if not value:
        return "is an empty list"
    held = f"an object with {', '.join(map(str, value[0]))}" if isinstance(value[0], dict) else kind_of(value[0])
    return f"is a list whose first element is {held}, expected a turn with role and content, or from and value"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
