"""The turns of a chat as rows write them: a list of messages, that list as JSON text, or one text as a single turn.

Content is text, or a list of text parts, which are one text as the family's chat template has it. Nothing is rendered
that is not text: tool calls, their results, pictures and sounds are refused, with the cure.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gemma_ft.data.conversation import Role, Turn, kind_of, text_fault
from gemma_ft.data.read.columns import FieldError
from gemma_ft.data.read.fields import Fields, says_something, telling
from gemma_ft.data.read.json_rows import DECODER
from gemma_ft.families.chat_template import ChatTemplate

TURN_ROLES: dict[str, Role] = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    **dict.fromkeys(("assistant", "model", "gpt", "chatgpt", "bing", "bard", "claude"), "assistant"),
}  # fmt: skip
TOOL_ROLES = {
    "tool", "tools", "tool_call", "tool_calls", "tool_response", "tool_result", "function", "function_call",
    "function_response", "observation", "ipython", "environment",
}  # fmt: skip
TOOL_CALLS = ("tool_calls", "function_call")
NO_TOOLS = "nothing renders tool calls or their results; take such rows out, or write them as text of the turns"
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
SPEAKERS = (("role", "content"), ("from", "value"))  # of messages, and of sharegpt
TRAINED = (("train", False, True), ("weight", 0, 1))  # keys of an answer that say whether it is trained: off, on
MAX_TURNS = 2000


def keys_of(value: Any) -> tuple[str, str] | None:
    """Which of SPEAKERS the first turn of a list has (of one in text too); None for no list of turns."""
    turns = _parsed(value) if isinstance(value, str) else value
    first = turns[0] if isinstance(turns, list) and turns else None
    return next((keys for keys in SPEAKERS if isinstance(first, dict) and keys[0] in first), None)


def turn_list(value: Any, name: str) -> list[Any]:
    """The list in a field `name`, or in its text. Raises: FieldError for anything else."""
    turns = _parsed(value) if isinstance(value, str) else value
    if not isinstance(turns, list):
        got = "text that is no list in JSON" if isinstance(value, str) else kind_of(value)
        raise FieldError(f"expected a list of turns in {name!r}, got {got}")
    return turns


def turns_in(value: Any, name: str, keys: tuple[str, str], fields: Fields) -> list[Turn]:
    """The turns of a list, each checked: an object with `keys`, a known role, text as content. What else the objects
    hold is passed over in `fields`.

    Raises: FieldError.
    """
    turns = turn_list(value, name)
    if len(turns) > MAX_TURNS:
        raise FieldError(f"has {len(turns)} turns, more than {MAX_TURNS}")
    found: list[Turn] = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise FieldError(f"turn {number}: expected an object, got {kind_of(turn)}")
        found.append(_turn(turn, number, keys, fields.chat))
        left = telling(turn, turn.keys() - {*keys, "train", "weight"}) if len(turn) > len(keys) else ()
        fields.passed_over += [f"{name}[].{key}" for key in sorted(left)]
    return found


def said(value: Any, name: str, role: Role, fields: Fields) -> list[Turn]:
    """The turns of a field that holds one text, by `role`, a turn, or a list of turns. Raises: FieldError."""
    value = [value] if isinstance(value, dict) and keys_of([value]) else value
    keys = keys_of(value) if isinstance(value, list) else None
    if keys is not None:
        return turns_in(value, name, keys, fields)
    return [Turn(role, text_of(value, name, fields.chat))]


def asked(turns: list[Turn]) -> list[Turn]:
    """Turns that are a prompt: answers in it are not trained, as TRL has it of prompt and completion."""
    return [replace(turn, train=False) if turn.role == "assistant" else turn for turn in turns]


def text_of(value: Any, name: str, chat: ChatTemplate) -> str:
    """A text, or the one that a list of text parts is in `chat`. Raises: FieldError for anything else."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        return chat.joined([_text_of_part(part, f"{name}[{at}]") for at, part in enumerate(value)])
    fault = text_fault(value)
    if fault:
        raise FieldError(f"{name!r} {fault}")
    return str(value)


def refuse_tool_calls(values: Mapping[str, Any]) -> None:
    """Raises: FieldError where a row or a turn calls a tool."""
    found = next((name for name in TOOL_CALLS if name in values and says_something(values[name])), None)
    if found is not None:
        raise FieldError(f"{found!r}: {NO_TOOLS}")


def refuse_media(values: Mapping[str, Any]) -> None:
    """Raises: FieldError where a row or a turn comes with a picture, a sound or a film."""
    found = next((name for name in MEDIA if name in values and _holds_something(values[name])), None)
    if found is not None:
        raise FieldError(
            f"{found!r} is not empty: only text can be trained, and the answer may be about what is not in it; take "
            "the row out, or the field where the text says all"
        )


def _holds_something(value: Any) -> bool:
    """Whether a field of MEDIA names or holds something; tables fill absent ones with lists and objects of nulls."""
    if isinstance(value, dict | list | tuple):
        return any(map(_holds_something, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str | bytes) and bool(value)


def _turn(turn: dict[str, Any], number: int, keys: tuple[str, str], chat: ChatTemplate) -> Turn:
    try:
        refuse_tool_calls(turn)
        refuse_media(turn)
        for key in keys:
            if key not in turn:
                raise FieldError(f"no field {key!r}; the turn has {', '.join(map(str, turn)) or 'none'}")
        role = turn[keys[0]]
        known = TURN_ROLES.get(role) if isinstance(role, str) else None
        if isinstance(role, str) and role in TOOL_ROLES:
            raise FieldError(f"role {role!r}: {NO_TOOLS}")
        if known is None:
            raise FieldError(f"unknown role {role!r}; known roles: {', '.join(TURN_ROLES)}")
        return Turn(known, text_of(turn[keys[1]], keys[1], chat), _trained(turn, known))
    except FieldError as fault:
        raise FieldError(f"turn {number}: {fault}") from None


def _trained(turn: Mapping[str, Any], role: Role) -> bool:
    """Whether an answer is to be trained: `train: false` beside it says no, and so does OpenAI's `weight: 0`."""
    for name, off, on in TRAINED:
        value = turn.get(name, on)
        if value is None or role != "assistant":
            continue
        if value not in (off, on) or isinstance(value, bool) != isinstance(on, bool):
            raise FieldError(f"{name!r} is {value!r}, expected {str(on).lower()} or {str(off).lower()}")
        if value == off:
            return False
    return True


def _text_of_part(part: dict[str, Any], name: str) -> str:
    kind = part.get("type", "text")
    if kind != "text" or "text" not in part:
        shown = kind if isinstance(kind, str) and "type" in part else ", ".join(map(str, part)) or "none"
        raise FieldError(f"{name!r} is a part of the kind {shown!r}; only text can be trained; take the row out")
    fault = text_fault(part["text"])
    if fault:
        raise FieldError(f"'{name}.text' {fault}")
    return str(part["text"])


def _parsed(text: str) -> Any:
    """What a text says that begins as a list, in JSON or as Python prints it; None for any other."""
    if not text.lstrip().startswith("["):
        return None
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError):
        return _printed(text) if "'" in text else None


def _printed(text: str) -> Any:
    """The same of a list as Python prints it: pandas' to_csv writes lists so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in what is no such text
        try:
            value = ast.literal_eval(text.strip())
            json.dumps(value)  # JSON's kinds alone
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return None
    return value
