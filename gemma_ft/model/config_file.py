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
from gemma_ft.families.family import LAYER_TYPES, Composite, Family, Fields, Rope
from gemma_ft.families.records import COMPOSITES, FAMILIES, PRESETS, family_of, known_families, text_fields

REWARD_CLASS = "ForSequenceClassification"  # how transformers' names of them end
READ_AT_MOST = 2**20  # bytes: a config.json has some thousand
# What folders of one size say in several ways, or have made longer: none of it tells a size.
_SPELLED_IN_SEVERAL_WAYS = ("layer_types", "rope_parameters", "vocab_size", "max_position_embeddings")


def other_family(model_type: Any) -> str:
    """What is said of a model_type that is no Gemma of ours."""
    return f"model_type {model_type!r} is not {known_families('or')}; supported: {', '.join([*FAMILIES, *COMPOSITES])}"


def check_family(folder: Path, name: str) -> None:
    """Raises: UserError when the config.json of `folder`, which the user knows as `name`, is of another family, or asks
    for what no family computes (`refuse_fields`). One that is missing or damaged is refused where it is read in full.
    """
    found = _fields(folder)
    family = family_of(found.get("model_type"))
    if found and family is None:
        raise UserError(f"{name}: {other_family(found.get('model_type'))}")
    if family is not None:
        refuse_fields(found, family)


def refuse_fields(fields: Fields, family: Family) -> None:
    """Raises: UserError for what a config of a family may say and is not computed here, or what transformers would not
    compute as it is written; `fields`: as they lie in config.json, or as transformers completed them.
    """
    if fields.get("use_bidirectional_attention"):
        raise UserError("config.json: use_bidirectional_attention is set; this is an encoder, not a causal Gemma")
    cap = fields.get("attn_logit_softcapping")
    if cap is not None and not family.attn_softcap:
        raise UserError(
            f"config.json: attn_logit_softcapping {cap!r} is set, which transformers ignores in a {family.label}; "
            "set it to null, or fetch the file again"
        )
    stored = fields.get("layer_types")
    for kind in stored if isinstance(stored, list) and family.window_period is not None else ():
        if kind not in LAYER_TYPES:
            raise UserError(
                f"config.json: layer_types has {kind!r}; the layers of a {family.label} are {' or '.join(LAYER_TYPES)}"
            )
    _refuse_ropes(fields, family)


def _refuse_ropes(fields: Fields, family: Family) -> None:
    ropes, scaling = fields.get("rope_parameters") or {}, fields.get("rope_scaling") or {}
    if not isinstance(ropes, Mapping) or not isinstance(scaling, Mapping):
        return  # said where transformers stumbles over it
    if len(family.ropes) > 1:
        flat = sorted(set(ropes) - set(family.ropes))
        if flat:
            raise UserError(
                f"config.json: rope_parameters has {flat[0]!r} beside its types of layers, which transformers ignores; "
                f"put it under {' and '.join(family.ropes)}"
            )
        parts = [part or {} for part in ropes.values()]
        if not all(isinstance(part, Mapping) for part in parts):
            return
        for part, usual in [(scaling, Rope.type), *((part, part.get("type")) for part in parts)]:
            if "type" in part and part["type"] != part.get("rope_type", usual):
                raise UserError(
                    f"config.json: a RoPE has type {part['type']!r}, which transformers ignores in a {family.label}; "
                    "call it rope_type"
                )
    for layer_type in family.ropes:
        found = family.rope(layer_type, fields).type
        if found not in family.rope_types:
            usual = " and ".join(map(repr, family.rope_types))
            raise UserError(f"config.json: rope_type {found!r} is not supported; {family.label} uses {usual}")


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


def is_reward_model(folder: Path) -> bool:
    """Whether the config.json of a folder is a reward model's: its head gives a number, and no token."""
    return names_reward_model(_said(folder).get("architectures"))


def names_reward_model(architectures: Any) -> bool:
    """Whether what a config.json says under `architectures` is a model with a head for sequences."""
    names = architectures if isinstance(architectures, list) else []
    return any(isinstance(one, str) and one.endswith(REWARD_CLASS) for one in names)


def family_in(folder: Path) -> Family | None:
    """The family of the text model in a folder; None where its config.json names none of ours, or cannot be read."""
    return family_of(_fields(folder).get("model_type"))


def composite_in(folder: Path) -> Composite | None:
    """Of which kind a folder of several models is; None for a text model alone, and what cannot be read."""
    return COMPOSITES.get(str(_said(folder).get("model_type")))


def _fields(folder: Path) -> dict[str, Any]:
    """What the config.json of a folder says of its text model, or nothing where it cannot be read."""
    return dict(text_fields(_said(folder)))


def _said(folder: Path) -> dict[str, Any]:
    """What the config.json of a folder says, or nothing where it cannot be read."""
    try:
        with (folder / "config.json").open("rb") as file:
            found = json.loads(file.read(READ_AT_MOST))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
