"""Writes the tables of docs/recipes.md: every key of a recipe with type, default and meaning, out of the schema.

.venv/bin/python docs/recipes_page.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gemma_ft.recipe.json_schema import json_schema
from gemma_ft.recipe.objectives import train_defaults
from gemma_ft.recipe.schema import Recipe

PAGE = Path(__file__).with_name("recipes.md")
HEAD = ("| key | type | default | meaning |", "|---|---|---|---|")
SOURCE = "Sources of rows"  # the heading of what stands in data.train and data.eval


def with_tables(page: str) -> str:
    """The page with its tables as the schema has them now."""
    return re.sub(r"(<!-- keys -->\n).*?(<!-- end -->)", lambda mark: mark[1] + tables() + mark[2], page, flags=re.S)


def tables() -> str:
    """Every section under its heading, in the order of a recipe: the top level, then block by block."""
    properties, model = json_schema()["properties"], Recipe.model_json_schema()
    sections = model["$defs"]
    rows = []
    parts = [""]
    for key, value in properties.items():
        names = sections_of(value)
        needed = key in model["required"]
        if not names:
            rows.append(row(key, type_of(value), default_of(value, needed), value["description"]))
            continue
        block = sections[names[0]]
        default = "required" if needed else default_kind(value) if value.get("default") else "not set"
        rows.append(row(key, f"[block](#{key})", default, value.get("description") or sentence(block)))
        parts.append(section(key, block) if len(names) == 1 else kinds(key, value, [sections[name] for name in names]))
        if key == "data":
            parts.append(section(SOURCE, sections["Source"]))
    parts[0] = "\n".join(["## Top level", "", paragraph(model), "", *HEAD, *rows, ""])
    return "\n".join(parts)


def kinds(key: str, value: dict[str, Any], blocks: list[dict[str, Any]]) -> str:
    """A block of several kinds: what it is, and each kind under a heading of its own."""
    words = [str(block["properties"]["kind"]["const"]) for block in blocks]
    short = f"`{key}: {words[1]}` is `{key}: {{kind: {words[1]}}}`, with the defaults of that kind."
    parts = [f"## {key}", "", f"{value['description']}. {short}", ""]
    for word, block in zip(words, blocks, strict=True):
        parts += [section(word, block, "###"), *taken_by(word)]
    return "\n".join(parts)


def taken_by(kind: str) -> list[str]:
    """What a kind of objective takes where `train` does not say it, as lines."""
    of_all, of_adapter = train_defaults(kind, "full"), train_defaults(kind, "lora")
    told = [
        f"`{key}: {written(value)}`" + (f" (full: `{written(of_all[key])}`)" if of_all[key] != value else "")
        for key, value in of_adapter.items()
    ]
    return [f"Of [train](#train), where the recipe has none: {', '.join(told)}.", ""] if told else []


def written(value: float) -> str:
    """A number as YAML reads it: 5e-06 is a text there."""
    return f"{value:.1e}" if value < 1e-3 else f"{value:g}"


def section(title: str, block: dict[str, Any], level: str = "##") -> str:
    """Heading, what the block is, and its keys."""
    required = block.get("required", ())
    rows = [
        row(key, type_of(value), default_of(value, key in required), value["description"])
        for key, value in block["properties"].items()
    ]
    return "\n".join([f"{level} {title}", "", paragraph(block), "", *HEAD, *rows, ""])


def row(key: str, kind: str, default: str, meaning: str) -> str:
    return f"| `{key}` | {kind} | {default} | {meaning.replace('|', chr(92) + '|')} |"


def paragraph(block: dict[str, Any]) -> str:
    return " ".join(block["description"].split())


def sentence(block: dict[str, Any]) -> str:
    return paragraph(block).partition(". ")[0].removesuffix(".")


def sections_of(value: dict[str, Any]) -> list[str]:
    """The names of the sections that a key's value may be: several where it has kinds, none where it is a plain one or
    a list.
    """
    options = [value, *value.get("anyOf", ())]
    options += [one for option in options for one in option.get("oneOf", ())]
    return [one["$ref"].rpartition("/")[2] for one in options if "$ref" in one]


def default_kind(value: dict[str, Any]) -> str:
    """What a block is where a recipe has none."""
    return f"`{value['default']['kind']}`" if len(sections_of(value)) > 1 else "its own"


def default_of(value: dict[str, Any], required: bool) -> str:
    default = value.get("default")
    if required:
        return "required"
    return "not set" if default is None else f"`{default if isinstance(default, str) else json.dumps(default)}`"


def type_of(value: dict[str, Any]) -> str:
    """A type of JSON Schema in words, ranges included. That a key may also be null, its default says."""
    if sections_of(value):
        return f"path, [source](#{SOURCE.lower().replace(' ', '-')}), or a list of them"
    if "anyOf" in value:
        kinds = [type_of(one) for one in value["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in value or "const" in value:
        return " \\| ".join(f"`{one}`" for one in value.get("enum", [value.get("const")]))
    kind = value["type"]
    if kind == "array":
        return f"list of {type_of(value['items'])}"
    if kind == "object":
        return f"mapping of {type_of(value['propertyNames'])} to {type_of(value['additionalProperties'])}"
    if kind in ("integer", "number"):
        return " ".join([kind, *limits(value)])
    if kind == "boolean":
        return "`true` \\| `false`"
    assert kind == "string", kind
    return "text"


def limits(value: dict[str, Any]) -> list[str]:
    """The range of a number: "≥ 1, ≤ 64"."""
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    found = [f"{sign} {value[key]:,.12g}" for key, sign in signs.items() if key in value]
    return [", ".join(found)] if found else []


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
