"""A config.json looked at without transformers: which family and size a folder is, in milliseconds.

A folder that cannot be used is refused before anything is imported or encoded for it; what a config says in full is
model/config.py's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_ft.errors import UserError
from gemma_ft.families.records import COMPOSITES, FAMILIES, PRESETS, family_of, known_families, text_fields

READ_AT_MOST = 2**20  # bytes: a config.json has some thousand
# What folders of one size say in several ways, or have made longer: none of it tells a size.
_SPELLED_IN_SEVERAL_WAYS = ("layer_types", "rope_parameters", "vocab_size", "max_position_embeddings")


def other_family(model_type: Any) -> str:
    """What is said of a model_type that is no Gemma of ours."""
    return f"model_type {model_type!r} is not {known_families('or')}; supported: {', '.join([*FAMILIES, *COMPOSITES])}"


def check_family(folder: Path, name: str) -> None:
    """Raises: UserError when the config.json of `folder`, which the user knows as `name`, is of another family. One
    that is missing or damaged is refused where it is read in full.
    """
    found = _fields(folder)
    if found and family_of(found.get("model_type")) is None:
        raise UserError(f"{name}: {other_family(found.get('model_type'))}")


def check_preset(found: Mapping[str, Any], preset: str, name: str) -> None:
    """Raises: UserError when the fields of a config are not of the preset's shape, and says which preset they are, if
    any. Fields that it does not have are not compared.
    """

    def differences(key: str) -> list[str]:
        expected = {"model_type": PRESETS[key].model_type, **PRESETS[key].fields}
        return [
            f"{field} {found[field]}, not {value}"
            for field, value in expected.items()
            if field in found and found[field] != value and field not in _SPELLED_IN_SEVERAL_WAYS
        ]

    wrong = differences(preset)
    if wrong:
        fitting = next((key for key in PRESETS if not differences(key)), None)
        cure = f"set model.preset: {fitting}" if fitting else "set model.preset to the size that it is"
        raise UserError(f"model.preset: {name} is not a {preset} ({wrong[0]}); {cure}")


def check_size(folder: Path, preset: str, name: str) -> None:
    """Raises: UserError when the config.json of a folder is of another family or size than a recipe's preset."""
    check_family(folder, name)
    check_preset(_fields(folder), preset, name)


def _fields(folder: Path) -> dict[str, Any]:
    """What the config.json of a folder says of its text model, or nothing where it cannot be read."""
    try:
        with (folder / "config.json").open("rb") as file:
            found = json.loads(file.read(READ_AT_MOST))
    except (OSError, ValueError, RecursionError):
        return {}
    return dict(text_fields(found)) if isinstance(found, dict) else {}
