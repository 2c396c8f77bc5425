"""Rows -> conversations and documents. The format is named, or detected and told; two possible readings are refused.

| format            | fields                                                                              |
|-------------------|-------------------------------------------------------------------------------------|
| messages          | messages: [{role: system, user or assistant, content}]                              |
| sharegpt          | conversations: [{from: human, gpt, ..., value}]                                     |
| alpaca            | instruction, input (may be missing), output; or instruction, instances: [{input, output}] |
| prompt_completion | prompt, completion; or question, answer                                             |
| text              | text                                                                                |
| preference        | prompt, chosen, rejected, or two chats: chosen, rejected; the chosen one is trained |

A `system` field beside sharegpt, alpaca or prompt_completion is a system turn. Nothing is rendered that is not text:
nulls, numbers and lists as content are refused, with the place.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gemma_ft.data.bad_rows import BadRows
from gemma_ft.data.columns import FieldError, check_columns, fill_text, fill_value, fill_weight
from gemma_ft.data.items import Conversation, Document, Item, Role, Turn, kind_of, order_fault, text_fault
from gemma_ft.data.sources import Row
from gemma_ft.errors import DataError

__all__ = ["FORMATS", "Conversation", "Document", "Turn", "detect_format", "parse_rows"]

FORMATS = ("messages", "sharegpt", "alpaca", "prompt_completion", "text", "preference")
MESSAGE_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant", "model": "assistant"}
SHAREGPT_ROLES: dict[str, Role] = {
    **MESSAGE_ROLES, "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "claude": "assistant",
}  # fmt: skip
LIST_FIELDS = ("messages", "conversations", "conversation")
PREFERENCE = ("prompt", "chosen", "rejected")
PAIRS = (("prompt", "completion"), ("question", "answer"))
MAX_TURNS = 2000
SAMPLED_ROWS = 100

Fields = Mapping[str, Any]


def detect_format(rows: Sequence[Row], columns: Mapping[str, str] | None = None) -> tuple[str, str]:
    """(format, one-line reason) for these rows: what most of the first rows have, or what `columns` names.

    Raises: DataError when no format fits, or more than one does.
    """
    columns = columns or {}
    check_columns(columns)
    if not rows:
        raise DataError("no rows to tell a format from")
    source = rows[0].where.rpartition(":")[0]
    sample = rows[:SAMPLED_ROWS]
    if "chosen" in columns:
        return "preference", "data.columns names chosen and rejected"
    if "prompt" in columns:
        return "prompt_completion", "data.columns names prompt and completion"
    if "text" in columns:
        return "text", "data.columns names text"
    if "messages" in columns:
        kinds = [_list_kind(_value_or_none(columns["messages"], row.fields)) for row in sample]
        kind = "sharegpt" if kinds.count("sharegpt") > kinds.count("messages") else "messages"
        return kind, f"data.columns names messages, whose turns are those of {kind}"
    votes: dict[tuple[str, str], int] = {}
    for row in sample:
        for reading in _readings(row.fields):
            votes[reading] = votes.get(reading, 0) + 1
    fitting = [reading for reading, count in votes.items() if 2 * count >= len(sample)] or list(votes)
    if len(fitting) == 1:
        return fitting[0][0], f"the rows have {fitting[0][1]}"
    if not fitting:
        names = ", ".join(map(str, rows[0].fields)) or "none"
        raise DataError(f"{source}: no known format has the fields {names}; map them with data.columns")
    both = " and ".join(f"{name} ({why})" for name, why in fitting)
    raise DataError(f"{source}: {both} fit; set data.format, or data.columns")


def parse_rows(rows: Sequence[Row], *, format: str = "auto", columns: Mapping[str, str] | None = None) -> list[Item]:
    """Conversations or documents, in the rows' order, out of rows of one format ("auto": detected).

    In sharegpt, an answer before the first question and a question after the last answer are left out and counted in
    `left_out` (such data is cut from longer chats); in messages the same is refused.

    Raises: DataError listing the first five bad rows as `file:line: reason`; DataError for a bad format or columns.
    """
    check_format(format, columns or {})
    name = detect_format(rows, columns)[0] if format == "auto" else format
    check_format(name, columns or {})
    bad = BadRows()
    items = [item for row in rows for item in parse_row(row, name, columns or {}, bad)]
    bad.raise_if_any()
    return items


def check_format(format: str, columns: Mapping[str, str]) -> None:
    """Raises: DataError for a format that is unknown, or that `columns` do not go with; "auto" goes with all."""
    check_columns(columns)
    if format == "auto":
        return
    if format not in FORMATS:
        raise DataError(f"data.format: unknown format {format!r}; use auto, {', '.join(FORMATS)}")
    wanted = {"prompt_completion": "completion", "text": "text", "messages": "messages", "sharegpt": "messages",
              "preference": "chosen"}.get(format)  # fmt: skip
    if set(columns) - {"weight"} and wanted not in columns:
        raise DataError(f"data.columns: {', '.join(columns)} cannot be used with format {format}")


def parse_row(row: Row, format: str, columns: Mapping[str, str], bad: BadRows) -> list[Item]:
    """What one row of a format that is known becomes; nothing, and a line in `bad`, where it is none of that format."""
    try:
        items = PARSERS[format](row.where, row.fields, columns)
        if "weight" not in columns:
            return items
        weight = fill_weight(columns["weight"], row.fields)
        return [replace(item, weight=weight) for item in items]
    except FieldError as fault:
        bad.add(row.where, str(fault))
        return []


def _readings(fields: Fields) -> list[tuple[str, str]]:
    """Every (format, fields that say so) this row could be read as."""
    readings = [(kind, name) for name in LIST_FIELDS if (kind := _list_kind(fields.get(name)))]
    if "instruction" in fields and ("output" in fields or "instances" in fields):
        readings.append(("alpaca", f"instruction, {'output' if 'output' in fields else 'instances'}"))
    readings += [("prompt_completion", f"{one}, {two}") for one, two in PAIRS if one in fields and two in fields]
    if "chosen" in fields and "rejected" in fields:
        readings.append(("preference", "chosen, rejected"))
    if "text" in fields:
        readings.append(("text", "text"))
    return readings


def _list_kind(value: Any) -> str | None:
    """ "messages" or "sharegpt", by the keys of the first turn; None when this is no list of turns."""
    first = value[0] if isinstance(value, list) and value else None
    if not isinstance(first, dict):
        return None
    return "messages" if "role" in first else "sharegpt" if "from" in first else None


def _value_or_none(template: str, fields: Fields) -> Any:
    try:
        return fill_value(template, fields)
    except FieldError:
        return None


def _text(fields: Fields, name: str, *, optional: bool = False) -> str:
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


def _system(fields: Fields, columns: Mapping[str, str]) -> list[Turn]:
    content = fill_text(columns["system"], fields) if "system" in columns else _text(fields, "system", optional=True)
    return [Turn("system", content)] if content.strip() else []


def _dialog(fields: Fields, columns: Mapping[str, str], roles: Mapping[str, Role], keys: tuple[str, str]) -> list[Turn]:
    """The turns of a row's list, each checked: an object, a known role, text as content."""
    name = next((name for name in LIST_FIELDS if name in fields), LIST_FIELDS[0])
    turns = fill_value(columns["messages"], fields) if "messages" in columns else fields.get(name)
    if not isinstance(turns, list):
        raise FieldError(f"expected a list of turns in {columns.get('messages', name)!r}, got {kind_of(turns)}")
    if len(turns) > MAX_TURNS:
        raise FieldError(f"has {len(turns)} turns, more than {MAX_TURNS}")
    result: list[Turn] = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise FieldError(f"turn {number}: expected an object, got {kind_of(turn)}")
        for key in keys:
            if key not in turn:
                raise FieldError(f"turn {number}: no field {key!r}; the turn has {', '.join(turn) or 'none'}")
        role, content = turn[keys[0]], turn[keys[1]]
        known = roles.get(role) if isinstance(role, str) else None
        if known is None:
            raise FieldError(f"turn {number}: unknown role {role!r}; known roles: {', '.join(roles)}")
        fault = text_fault(content)
        if fault:
            raise FieldError(f"turn {number}: {keys[1]!r} {fault}")
        result.append(Turn(known, content, _trained(turn, known, number)))
    return result


def _trained(turn: Mapping[str, Any], role: Role, number: int) -> bool:
    """Whether an answer is to be trained: `train: false` beside it says no, and so does OpenAI's `weight: 0`."""
    for name, off, on in (("train", False, True), ("weight", 0, 1)):
        said = turn.get(name, on)
        if said is None or role != "assistant":
            continue
        if said not in (off, on) or isinstance(said, bool) != isinstance(on, bool):
            raise FieldError(f"turn {number}: {name!r} is {said!r}, expected {str(on).lower()} or {str(off).lower()}")
        if said == off:
            return False
    return True


def _checked(where: str, turns: list[Turn], left_out: int = 0) -> Conversation:
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


def _messages(where: str, fields: Fields, columns: Mapping[str, str]) -> list[Item]:
    system = _system(fields, columns) if "system" in columns else []
    return [_checked(where, system + _dialog(fields, columns, MESSAGE_ROLES, ("role", "content")))]


def _sharegpt(where: str, fields: Fields, columns: Mapping[str, str]) -> list[Item]:
    turns = _dialog(fields, columns, SHAREGPT_ROLES, ("from", "value"))
    system = _system(fields, columns)
    whole = len(turns)
    if turns and turns[0].role == "system" and not system:
        system, turns, whole = turns[:1], turns[1:], whole - 1
    if turns and turns[0].role == "assistant":
        turns = turns[1:]
    if turns and turns[-1].role == "user":
        turns = turns[:-1]
    return [_checked(where, system + turns, left_out=whole - len(turns))]


def _alpaca(where: str, fields: Fields, columns: Mapping[str, str]) -> list[Item]:
    instruction = _text(fields, "instruction")
    pairs: Any = fields["instances"] if "instances" in fields and "output" not in fields else [fields]
    if not isinstance(pairs, list) or not pairs:
        raise FieldError(f"'instances' is {kind_of(pairs) if pairs else 'empty'}, expected a list of input and output")
    items: list[Item] = []
    for number, pair in enumerate(pairs):
        if not isinstance(pair, dict):
            raise FieldError(f"'instances[{number}]' is {kind_of(pair)}, expected an object")
        given = _text(pair, "input", optional=True)
        question = f"{instruction}\n\n{given}" if given.strip() else instruction
        turns = [*_system(fields, columns), Turn("user", question), Turn("assistant", _text(pair, "output"))]
        items.append(_checked(where, turns))
    return items


def _prompt_completion(where: str, fields: Fields, columns: Mapping[str, str]) -> list[Item]:
    if "prompt" in columns:
        pair = fill_text(columns["prompt"], fields), fill_text(columns["completion"], fields)
    else:  # a row that has half of a pair is complained of by the other half's name
        names = max(PAIRS, key=lambda names: sum(name in fields for name in names))
        pair = _text(fields, names[0]), _text(fields, names[1])
    return [_checked(where, [*_system(fields, columns), Turn("user", pair[0]), Turn("assistant", pair[1])])]


def _preference(where: str, fields: Fields, columns: Mapping[str, str]) -> list[Item]:
    """The prompt with its chosen answer; the rejected one is held to the same rules, and not trained."""
    if "chosen" not in columns and isinstance(fields.get("chosen"), list):  # two whole chats
        chats = [_messages(where, fields, {"messages": f"{{{name}}}"}) for name in ("chosen", "rejected")]
        return chats[0]
    if "chosen" in columns:
        prompt, chosen, rejected = (fill_text(columns[name], fields) for name in PREFERENCE)
    else:
        prompt, chosen, rejected = (_text(fields, name) for name in PREFERENCE)
    if chosen.strip() == rejected.strip():
        raise FieldError("'chosen' and 'rejected' are the same answer")
    return [_checked(where, [*_system(fields, columns), Turn("user", prompt), Turn("assistant", chosen)])]


def _document(where: str, fields: Fields, columns: Mapping[str, str]) -> list[Item]:
    return [Document(where, fill_text(columns["text"], fields) if "text" in columns else _text(fields, "text"))]


PARSERS: dict[str, Callable[[str, Fields, Mapping[str, str]], list[Item]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _document,
    "preference": _preference,
}
