"""Plain values with marks to a `Recipe`, or every fault in one error, in words that say what to do."""

import re
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from gemma_ft.recipe.objectives import KINDS
from gemma_ft.recipe.problems import Fault, KeyPath, Mark, did_you_mean, dotted, refuse, shown
from gemma_ft.recipe.schema import Recipe
from gemma_ft.recipe.section import EXPANDED, Location
from gemma_ft.recipe.yaml_marks import Document
from gemma_ft.system.redact import ACCESS_TOKEN

BOUNDS = {
    "greater_than": "must be more than {gt:g}",
    "greater_than_equal": "must be {ge:g} or more",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be {le:g} or less",
    "string_too_long": "must be at most {max_length} characters",
    "too_short": "must name {min_length} or more",
    "too_long": "must name {max_length} or fewer",
}
OTHERWISE = {"bfloat16": "bf16", "fp32": "float32", "f32": "float32"}  # as others call it
EXPECTED = {
    "float_type": "a number",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "string_type": "text",
    "finite_number": "a finite number",
    "model_type": "a block of keys",
    "model_attributes_type": "a block of keys, or its kind alone",
    "dict_type": "a block of keys",
    "list_type": "a path, a block of keys, or a list of them",
    "string_pattern_mismatch": "1 to 64 letters, digits, '.', '_' or '-'",
}


def validate(document: Document) -> Recipe:
    """The recipe that a document's values make.

    Raises: RecipeError with one line for each fault, those that reading found among them.
    """
    tokens = list(_access_tokens(document.value, (), document))
    found = {fault.key for fault in document.faults + tokens}
    faults = document.faults + tokens
    recipe = None
    try:
        recipe = Recipe.model_validate(document.value)
    except ValidationError as error:
        wrong = [_fault(detail, document) for detail in error.errors(include_url=False)]
        # what reading already refused, and a token, are not shown a second time
        faults = faults + [fault for fault in wrong if fault is not None and fault.key not in found]
    refuse(faults)
    assert recipe is not None
    return recipe


def annotation_at(path: KeyPath) -> Any:
    """The type the schema gives to a key, None for a key it does not have."""
    here: Any = Recipe
    for part in path:
        fields = {key: field for section in _sections(here) for key, field in section.model_fields.items()}
        if isinstance(part, int):
            continue  # one of a list: its section is found as the list's is
        if part in fields:
            here = fields[str(part)].annotation
        elif (names := _mapping(here)) is not None:
            here = typing.get_args(names)[1]
        else:
            return None
    return here


def takes_text(annotation: Any) -> bool:
    """Whether any text is a value of this type (one of a list of words is not)."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return any(takes_text(part) for part in typing.get_args(annotation))
    return annotation is str


def location_keys(section: type[BaseModel] = Recipe) -> frozenset[str]:
    """The keys, in a block and in those below it, whose value is a path."""
    found: set[str] = set()
    for key, field in section.model_fields.items():
        if EXPANDED in field.metadata or Location in typing.get_args(field.annotation):
            found.add(key)
        for below in _sections(field.annotation):
            found |= location_keys(below)
    return frozenset(found)


def unknown_key(path: KeyPath) -> str:
    """What to say about a key that the schema does not have: the nearest one, or where the key belongs."""
    parent, word = path[:-1], str(path[-1])
    known = _keys(parent)
    if near := did_you_mean(word, known):
        return f"unknown key{near}"
    if word in Recipe.model_fields:
        return f"unknown key; did you mean '{word}' at the top level?"
    elsewhere = [name for name in Recipe.model_fields if word in _keys((name,))]
    if elsewhere:
        return f"unknown key; did you mean '{elsewhere[0]}.{word}'?"
    return f"unknown key; known here: {', '.join(known)}" if known else f"unknown key; {dotted(parent)} has none"


def _keys(path: KeyPath) -> list[str]:
    """The keys that a block may have; at the top, `extends` too, which the loader handles."""
    found = [key for section in _sections(annotation_at(path)) for key in section.model_fields]
    return list(dict.fromkeys(found)) + ([] if path else ["extends"])


def _mapping(annotation: Any) -> Any:
    """The dict in an annotation such as `dict[str, str] | None`."""
    return next((one for one in (annotation, *typing.get_args(annotation)) if typing.get_origin(one) is dict), None)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The blocks in an annotation such as `Adapter | None`, `list[Source]`, or one of several kinds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in typing.get_args(annotation) for found in _sections(part)]


def _fault(detail: ErrorDetails, document: Document) -> Fault | None:
    """One error of pydantic in our words, where it was written; None for the half of a union that was not meant."""
    path: KeyPath = detail["loc"]
    if path[:2] == ("adapter", "targets"):  # a union: its branches stand in the location
        if any(str(part).startswith("literal[") for part in path):
            return None
        path = path[:2] + tuple(part for part in path[2:] if isinstance(part, int))
    elif path[:1] == ("objective",) and len(path) > 2:  # a block of one kind, which stands in the location
        kind, path = str(path[1]), (path[0], *path[2:])
        if detail["type"] == "extra_forbidden":
            return Fault(_mark(path, document), dotted(path), _key_of_another(kind, str(path[-1])))
    elif detail["type"].startswith("union_tag") and isinstance(detail["input"], dict):
        path = (*path, "kind")
    elif "columns" in path:
        path = path[: path.index("columns") + 2]  # what follows says whether it is the key or the value
    if detail["type"] == "rule":
        key = detail["ctx"]["key"]
        path = tuple(key.split(".")) if key else path
    return Fault(_mark(path, document), dotted(path), _text(detail, path))


def _key_of_another(kind: str, word: str) -> str:
    """What to say about a key that a kind of objective does not have."""
    own = [key for key in KINDS[kind].model_fields if key != "kind"]
    others = [name for name, section in KINDS.items() if word in section.model_fields]
    if others:
        return f"{kind} has no such key ({', '.join(others)} {'has' if len(others) == 1 else 'have'}); " + _has(
            own, kind
        )
    return f"unknown key{did_you_mean(word, own) or '; ' + _has(own, kind)}"


def _has(keys: list[str], kind: str) -> str:
    return f"{kind} has {', '.join(keys) or 'none'}"


def _mark(path: KeyPath, document: Document) -> Mark:
    """The line of a key, or of the nearest block around it."""
    for end in range(len(path), -1, -1):
        if mark := document.marks.get(path[:end]):
            return mark
    return Mark("recipe")


def _text(detail: ErrorDetails, path: KeyPath) -> str:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "rule":
        return str(context["text"])
    if kind == "missing":
        return f"missing; every {'recipe' if len(path) < 3 else 'source'} needs it"
    if kind == "extra_forbidden":
        return unknown_key(path)
    if kind == "string_too_short":
        return "must not be empty"
    if kind in BOUNDS:
        return f"{BOUNDS[kind].format(**context)}, got {shown(value)}"
    if kind in EXPECTED:
        return f"expected {EXPECTED[kind]}, got {shown(value)}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        given = value.get("kind") if isinstance(value, dict) else value
        what = f"expected one of {', '.join(KINDS)}"
        return f"{what}, got {shown(given)}"
    if kind == "literal_error":
        words = re.findall(r"'([^']*)'", str(context["expected"]))
        near = did_you_mean(OTHERWISE.get(value, value), words) if isinstance(value, str) else ""
        return f"expected one of {', '.join(words)}, got {shown(value)}{near}"
    return " ".join(detail["msg"].split())


def _access_tokens(value: Any, path: KeyPath, document: Document) -> Iterator[Fault]:
    """A fault for each text that looks like a secret; the value itself is not shown."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _access_tokens(item, (*path, key), document)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _access_tokens(item, (*path, index), document)
    elif isinstance(value, str) and ACCESS_TOKEN.search(value):
        text = "looks like an access token; keep it out of recipes and commands: log in, or set it in the environment"
        yield Fault(_mark(path, document), dotted(path), text)
