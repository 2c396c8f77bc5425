"""`data.columns`: small templates over a row's fields: "{question}", "{meta.title}: {body}", "{turns[0].text}"."""

import math
import re
from collections.abc import Mapping
from typing import Any

from gemma_ft.data.conversation import kind_of, text_fault
from gemma_ft.errors import DataError

COLUMN_KEYS = ("prompt", "completion", "system", "messages", "text", "chosen", "rejected", "weight", "label", "margin")
BESIDE = {"system", "weight", "label", "margin"}  # keys that say nothing of a row's format
EXAMPLES = {
    "messages": "dialog",
    "weight": "score",
    "label": "good",
    "margin": "gap",
}  # of what such a field may be called
LEAST_WEIGHT, MAX_WEIGHT = 1e-6, 1e6
# "{{" and "}}" stand for braces. str.format is not used: it would give a template access to Python attributes.
PART = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d+)\]")
PATH = re.compile(r"[^.\[\]]+(?:\.[^.\[\]]+|\[\d+\])*")


class FieldError(Exception):
    """A row does not have what a template asks for; the message is the reason, without the place."""


def check_templates(columns: Mapping[str, str]) -> None:
    """Raises: DataError naming the first key that is unknown, or whose template is malformed."""
    for key, template in columns.items():
        if key not in COLUMN_KEYS:
            raise DataError(f"data.columns: unknown key {key!r}; use {', '.join(COLUMN_KEYS)}")
        for found in PART.finditer(template):
            if found[0] in ("{{", "}}"):
                continue
            if found[1] is None or not PATH.fullmatch(found[1].strip()):
                raise DataError(
                    f"data.columns.{key}: cannot read {found[0]!r} in {template!r}; write fields as {{name}}, "
                    "{name.inner} or {name[0].inner}, and braces as {{ }}"
                )


def lookup(fields: Mapping[str, Any], path: str) -> Any:
    """The value at `path`, such as "a.b[0].c". Raises: FieldError when a step does not exist."""
    if path in fields:  # a column whose very name holds a dot
        return fields[path]
    value: Any = fields
    done = ""
    for step in STEP.finditer(path):
        name, index = step[1], step[2]
        if name is not None:
            if not isinstance(value, Mapping):
                raise FieldError(f"{done!r} is {kind_of(value)}, it has no field {name!r}")
            if name not in value:
                raise FieldError(f"no field {(done + step[0])!r}; the row has {', '.join(map(str, value)) or 'none'}")
            value = value[name]
        else:
            if not isinstance(value, list):
                raise FieldError(f"{done!r} is {kind_of(value)}, it has no element {step[0]}")
            if int(index) >= len(value):
                raise FieldError(f"{done!r} has {len(value)} elements, no {step[0]}")
            value = value[int(index)]
        done += step[0]
    return value


def fill_text(template: str, fields: Mapping[str, Any]) -> str:
    """The template with its fields filled in. Raises: FieldError when a field is missing or is not text."""

    def replace(found: re.Match[str]) -> str:
        if found[0] in ("{{", "}}"):
            return found[0][0]
        path = (found[1] or "").strip()
        value = lookup(fields, path)
        fault = text_fault(value)
        if fault:
            raise FieldError(f"{path!r} {fault}")
        return str(value)

    return PART.sub(replace, template)


def fill(template: str, fields: Mapping[str, Any]) -> tuple[Any, str]:
    """(value, what to call it): of one field the raw value and its path, else text and the template.

    Raises: FieldError.
    """
    found = PART.fullmatch(template.strip())
    if found is not None and found[1] is not None:
        path = found[1].strip()
        return lookup(fields, path), path
    return fill_text(template, fields), template


def fill_value(template: str, fields: Mapping[str, Any], key: str = "messages") -> Any:
    """The raw value that a template of exactly one field names; `key`: of the template. Raises: FieldError."""
    found = PART.fullmatch(template.strip())
    if found is None or found[1] is None:
        raise FieldError(f"data.columns.{key} must be one field such as {{{EXAMPLES[key]}}}, got {template!r}")
    return lookup(fields, found[1].strip())


def fill_weight(template: str, fields: Mapping[str, Any]) -> float:
    """The number, 0 or LEAST_WEIGHT to MAX_WEIGHT, in the field that a template names; as text too, which is all that a
    CSV file has.

    Raises: FieldError for anything else.
    """
    value = fill_value(template, fields, "weight")
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise FieldError(f"the weight {template} is {kind_of(value)}, expected a number")
    try:
        weight = float(value)
    except ValueError as error:
        raise FieldError(f"the weight {template} is text, expected a number") from error
    except OverflowError:
        weight = math.inf
    if weight and not LEAST_WEIGHT <= weight <= MAX_WEIGHT:  # nor is nan
        raise FieldError(f"the weight {template} is {weight:g}, expected 0, or {LEAST_WEIGHT:g} to {MAX_WEIGHT:g}")
    return weight
