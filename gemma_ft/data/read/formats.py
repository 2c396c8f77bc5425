"""Rows -> conversations and documents, by one parser for each format (detect.py says which it is).

| format            | fields                                                                              |
|-------------------|-------------------------------------------------------------------------------------|
| messages          | messages: [{role: system, user or assistant, content}]                              |
| sharegpt          | conversations: [{from: human, gpt, ..., value}]                                     |
| alpaca            | instruction, input (may be missing), output; or instruction, instances: [{input, output}] |
| prompt_completion | prompt, completion; or question, answer; texts, or lists of turns                   |
| text              | text                                                                                |
| preference        | prompt, chosen, rejected, or two chats: chosen, rejected; the chosen one is trained |

A `system` field beside turns is a system turn. Nothing is rendered that is not text: nulls and numbers as content are
refused, with the place. What a row says in a field that no parser read is told with its items (`unread`); where it
changes what the answer means, the row is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gemma_ft.data.conversation import Conversation, Document, Item, Turn, kind_of, order_fault, text_fault
from gemma_ft.data.read.bad_rows import BadRows
from gemma_ft.data.read.columns import BESIDE, FieldError, check_columns, fill, fill_text, fill_value, fill_weight
from gemma_ft.data.read.detect import LIST_FIELDS, PAIRS, detect_format
from gemma_ft.data.read.fields import Fields, says_something, telling
from gemma_ft.data.read.sources import Row
from gemma_ft.data.read.turns import SPEAKERS, asked, refuse_tool_calls, said, text_of, turns_in
from gemma_ft.errors import DataError

__all__ = ["FORMATS", "Conversation", "Document", "Turn", "detect_format", "parse_rows"]

FORMATS = ("messages", "sharegpt", "alpaca", "prompt_completion", "text", "preference")
VERDICTS = ("label", "kto_tag")  # of unpaired preferences: whether the answer is a good one
COLUMNS_OF = {"prompt_completion": {"prompt", "completion"}, "text": {"text"}, "messages": {"messages"},
              "sharegpt": {"messages"}, "preference": {"prompt", "chosen", "rejected"}}  # fmt: skip

Columns = Mapping[str, str]


def parse_rows(
    rows: Sequence[Row], *, format: str = "auto", columns: Columns | None = None, trained: bool = True
) -> list[Item]:
    """Conversations or documents, in the rows' order, out of rows of one format ("auto": detected). `trained`: whether
    their answers are, so that one which is said to be bad is refused.

    In sharegpt, an answer before the first question and a question after the last answer are left out and counted in
    `left_out` (such data is cut from longer chats); in messages the same is refused.

    Raises: DataError listing the first five bad rows as `file:line: reason`; DataError for a bad format or columns.
    """
    check_format(format, columns or {})
    name = detect_format(rows, columns)[0] if format == "auto" else format
    check_format(name, columns or {})
    bad = BadRows()
    items = [item for row in rows for item in parse_row(row, name, columns or {}, bad, trained=trained)]
    bad.raise_if_any()
    return items


def check_format(format: str, columns: Columns) -> None:
    """Raises: DataError for a format that is unknown, or that `columns` do not go with; "auto" goes with all."""
    check_columns(columns)
    if format == "auto":
        return
    if format not in FORMATS:
        raise DataError(f"data.format: unknown format {format!r}; use auto, {', '.join(FORMATS)}")
    beside = {"weight"} if format == "text" else BESIDE
    if set(columns) - beside - COLUMNS_OF.get(format, set()):
        raise DataError(f"data.columns: {', '.join(columns)} cannot be used with format {format}")


def parse_row(row: Row, format: str, columns: Columns, bad: BadRows, *, trained: bool = True) -> list[Item]:
    """What one row of a format that is known becomes; nothing, and a line in `bad`, where it is none of that format.
    `trained`: as of `parse_rows`.
    """
    fields = Fields(row.fields)
    try:
        items = PARSERS[format](row.where, fields, columns)
        changes: dict[str, Any] = {}
        if "weight" in columns:
            changes["weight"] = fill_weight(columns["weight"], fields)
        if unread := fields.unread():
            changes["unread"] = unread if format == "text" or not trained else _told(fields, unread)
        return [replace(item, **changes) for item in items] if changes else items
    except FieldError as fault:
        bad.add(row.where, str(fault))
        return []


def _told(fields: Fields, unread: tuple[str, ...]) -> tuple[str, ...]:
    """What is to be told of the fields of a chat that were not read. Raises: FieldError for one without which the
    answer means something else.
    """
    refuse_tool_calls({name: fields.look(name) for name in unread})
    if "rejected" in unread and not says_something(fields.look("chosen")):
        raise FieldError("has 'rejected', and no 'chosen'; name that with data.columns.chosen, or take 'rejected' out")
    for name in VERDICTS:
        if name in unread and str(fields.look(name)).lower() == "false":
            raise FieldError(
                f"{name!r} is false: the answer is a bad one, and would be trained as a good one; take such rows out"
            )
    return tuple(name for name in unread if name not in VERDICTS or str(fields.look(name)).lower() != "true")


def _text(fields: Mapping[str, Any], name: str, *, optional: bool = False) -> str:
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


def _part(fields: Fields, columns: Columns, key: str, names: Sequence[str] = ()) -> tuple[Any, str]:
    """(value, its name) of what `columns` map to `key`; where they do not, of the first of `names` that is there."""
    if key in columns:
        return fill(columns[key], fields)
    names = names or (key,)
    name = next((name for name in names if name in fields), names[0])
    if name not in fields:
        cure = f"; map it with data.columns.{key}" if set(columns) - BESIDE else ""
        raise FieldError(f"no field {name!r}; the row has {', '.join(map(str, fields)) or 'none'}{cure}")
    return fields[name], name


def _system(fields: Fields, columns: Columns) -> list[Turn]:
    if "system" in columns:
        content = fill_text(columns["system"], fields)
    else:
        content = "" if fields.look("system") is None else text_of(fields["system"], "system")
    return [Turn("system", content)] if content.strip() else []


def _after(system: list[Turn], turns: list[Turn]) -> list[Turn]:
    """Turns behind the system text that stands beside them; where they begin with one of their own it is the same."""
    if not system or not turns or turns[0].role != "system":
        return system + turns
    if turns[0].content.strip() not in ("", system[0].content.strip()):
        raise FieldError("has a system turn, and another text beside the turns in 'system'; keep one of them")
    return system + turns[1:]


def _dialog(fields: Fields, columns: Columns, keys: tuple[str, str]) -> list[Turn]:
    """The turns of a row's list."""
    if "messages" in columns:
        return turns_in(fill_value(columns["messages"], fields), columns["messages"].strip(" {}"), keys, fields)
    name = next((name for name in LIST_FIELDS if name in fields), LIST_FIELDS[SPEAKERS.index(keys)])
    if name not in fields:
        raise FieldError(f"no field {name!r}; the row has {', '.join(map(str, fields)) or 'none'}")
    return turns_in(fields[name], name, keys, fields)


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


def _messages(where: str, fields: Fields, columns: Columns) -> list[Item]:
    return [_checked(where, _after(_system(fields, columns), _dialog(fields, columns, SPEAKERS[0])))]


def _sharegpt(where: str, fields: Fields, columns: Columns) -> list[Item]:
    turns = _after(_system(fields, columns), _dialog(fields, columns, SPEAKERS[1]))
    system, turns = (turns[:1], turns[1:]) if turns and turns[0].role == "system" else ([], turns)
    whole = len(turns)
    if turns and turns[0].role == "assistant":
        turns = turns[1:]
    if turns and turns[-1].role == "user":
        turns = turns[:-1]
    return [_checked(where, system + turns, left_out=whole - len(turns))]


def _alpaca(where: str, fields: Fields, columns: Columns) -> list[Item]:
    instruction = _text(fields, "instruction")
    pairs: Any = fields["instances"] if "instances" in fields and "output" not in fields else [fields]
    if not isinstance(pairs, list) or not pairs:
        raise FieldError(f"'instances' is {kind_of(pairs) if pairs else 'empty'}, expected a list of input and output")
    items: list[Item] = []
    for number, pair in enumerate(pairs):
        if not isinstance(pair, Mapping):
            raise FieldError(f"'instances[{number}]' is {kind_of(pair)}, expected an object")
        given = _text(pair, "input", optional=True)
        question = f"{instruction}\n\n{given}" if given.strip() else instruction
        turns = [*_system(fields, columns), Turn("user", question), Turn("assistant", _text(pair, "output"))]
        items.append(_checked(where, turns))
        if pair is not fields:
            left = telling(pair, pair.keys() - {"input", "output"})
            fields.passed_over += [f"instances[].{name}" for name in sorted(left)]
    return items


def _prompt_completion(where: str, fields: Fields, columns: Columns) -> list[Item]:
    names: Sequence[Sequence[str]] = tuple(zip(*PAIRS, strict=True))
    if not {"prompt", "completion"} & set(columns):  # a row that has half of a pair is complained of by the other half
        names = [(name,) for name in max(PAIRS, key=lambda names: sum(name in fields for name in names))]
    prompt, completion = (_part(fields, columns, key, one) for key, one in zip(PAIRS[0], names, strict=True))
    turns = asked(said(*prompt, "user", fields)) + said(*completion, "assistant", fields)
    return [_checked(where, _after(_system(fields, columns), turns))]


def _preference(where: str, fields: Fields, columns: Columns) -> list[Item]:
    """The prompt with its chosen answer; the rejected one is held to the same rules, and not trained."""
    chosen, rejected = (said(*_part(fields, columns, key), "assistant", fields) for key in ("chosen", "rejected"))
    if chosen[0].role == "assistant":
        if "prompt" not in columns and "prompt" not in fields:
            raise FieldError(
                f"no field 'prompt'; the row has {', '.join(map(str, fields))}; map it with data.columns.prompt, or "
                "give whole chats, as lists of turns, in 'chosen' and 'rejected'"
            )
        prompt = asked(said(*_part(fields, columns, "prompt"), "user", fields))
        if [turn.content.strip() for turn in chosen] == [turn.content.strip() for turn in rejected]:
            raise FieldError("'chosen' and 'rejected' are the same answer")
    else:  # whole chats; a prompt beside them is often their first question
        prompt, beside = [], fields.look("prompt")
        if isinstance(beside, str) and any(turn.content.strip() == beside.strip() for turn in chosen):
            fields.get("prompt")
    system = _system(fields, columns)
    chats = [_checked(where, _after(system, prompt + turns)) for turns in (chosen, rejected)]
    return list(chats[:1])


def _document(where: str, fields: Fields, columns: Columns) -> list[Item]:
    return [Document(where, fill_text(columns["text"], fields) if "text" in columns else _text(fields, "text"))]


PARSERS: dict[str, Callable[[str, Fields, Columns], list[Item]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _document,
    "preference": _preference,
}
