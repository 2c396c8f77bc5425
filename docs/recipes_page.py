"""Writes the tables of docs/recipes.md: every key of a recipe with type, default and meaning, out of the schema.

.venv/bin/python docs/recipes_page.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gemma_ft.recipe.json_schema import json_schema
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
        block = sections.get(section_of(value))
        needed = key in model["required"]
        if block is None:
            rows.append(row(key, type_of(value), default_of(value, needed), value["description"]))
            continue
        default = "required" if needed else "its own" if value.get("default") else "not set"
        rows.append(row(key, f"[block](#{key})", default, value.get("description") or sentence(block)))
        parts.append(section(key, block))
        if key == "data":
            parts.append(section(SOURCE, sections["Source"]))
    parts[0] = "\n".join(["## Top level", "", paragraph(model), "", *HEAD, *rows, ""])
    return "\n".join(parts)


def section(title: str, block: dict[str, Any]) -> str:
    """Heading, what the block is, and its keys."""
    required = block.get("required", ())
    rows = [
        row(key, type_of(value), default_of(value, key in required), value["description"])
        for key, value in block["properties"].items()
    ]
    return "\n".join([f"## {title}", "", paragraph(block), "", *HEAD, *rows, ""])


def row(key: str, kind: str, default: str, meaning: str) -> str:
    return f"| `{key}` | {kind} | {default} | {meaning.replace('|', chr(92) + '|')} |"


def paragraph(block: dict[str, Any]) -> str:
    return " ".join(block["description"].split())


def sentence(block: dict[str, Any]) -> str:
    return paragraph(block).partition(". ")[0].removesuffix(".")


def section_of(value: dict[str, Any]) -> str | None:
    """The name of the section that is a key's value, or None where it is a plain one or a list."""
    options = [value, *value.get("anyOf", ())]
    return next((one["$ref"].rpartition("/")[2] for one in options if "$ref" in one), None)


def default_of(value: dict[str, Any], required: bool) -> str:
    default = value.get("default")
    if required:
        return "required"
    return "not set" if default is None else f"`{default if isinstance(default, str) else json.dumps(default)}`"


def type_of(value: dict[str, Any]) -> str:
    """A type of JSON Schema in words, ranges included. That a key may also be null, its default says."""
    if section_of(value):
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
