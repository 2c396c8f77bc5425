"""The config.json of the model in a GGUF file: by the file's sizes the record of a published size, or the one that the
user names; and how far the file's own numbers agree with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers.configuration_utils import PreTrainedConfig

from gemma_ft.build.weights import EMBEDDING
from gemma_ft.errors import UserError, first_line
from gemma_ft.export.gguf_file import hyperparameters
from gemma_ft.export.gguf_reader import GgufFile
from gemma_ft.families.family import Family
from gemma_ft.families.records import FAMILIES, text_fields
from gemma_ft.model.config import GemmaNumerics, read_config

# config.json's words for the sizes of a model, by the end of GGUF's keys
SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
}
CONTEXT, VOCABULARY = "context_length", "vocab_size"
CLOSE = 1e-6  # GGUF has float32 where config.json has float64


@dataclass(frozen=True)
class FoundConfig:
    """The config of a file's model. fields: its config.json; name: the record or file it is from; notes: where the file
    says otherwise.
    """

    config: PreTrainedConfig
    fields: dict[str, Any]
    name: str
    notes: list[str]


def family_of_file(file: GgufFile) -> Family:
    """The family of a file's architecture. Raises: UserError for what holds no model of a family that is known."""
    kind, architecture = file.fields.get("general.type", "model"), file.fields.get("general.architecture")
    if kind == "adapter":
        raise UserError(f"{file.path}: an adapter, and no model; import the GGUF file of a whole model")
    if kind == "mmproj" or architecture == "clip":
        raise UserError(f"{file.path}: the projector of a vision model, and no text model; import the other file")
    if kind != "model":
        raise UserError(f"{file.path}: its general.type is {kind!r}; import the GGUF file of a whole model")
    parts = file.fields.get("split.count", 1)
    if parts != 1:
        raise UserError(f"{file.path}: one of {parts} parts of a model; join them with llama-gguf-split --merge")
    known = {family.gguf.architecture: family for family in FAMILIES.values() if family.gguf is not None}
    if architecture not in known:
        raise UserError(f"{file.path}: its architecture is {architecture!r}; {', '.join(known)} are imported")
    return known[architecture]


def config_of(file: GgufFile, family: Family, given: Path | None) -> FoundConfig:
    """The config of a file's model: `given`, or the record of its sizes.

    Raises: UserError where there is no such record, where `given` is of another size, or where the file says otherwise
    than the record and nothing is given.
    """
    sizes = _sizes(file, family)
    rows = _rows(file)
    if given is None:
        found, name = _recorded(file, family, sizes, rows), "the record"
        fields = found.to_diff_dict()
    else:
        found, name = _read(given, family), str(given)
        fields = dict(text_fields(_json(given)))
        for key, size in sizes.items():
            if getattr(found, key) != size:
                raise UserError(f"{given}: {key} is {getattr(found, key)}, but {file.path} has {size}; name its own")
    found.vocab_size = rows
    differences = _differences(file, family, found)
    if differences and given is None:
        raise UserError(
            f"{file.path}: says {differences[0]}, as no published {family.label} of its size; name the model's own "
            "config.json with --config"
        )
    notes = [f"the file says {one}; {name} was taken" for one in differences]
    context = file.fields.get(f"{family_key(family)}{CONTEXT}")
    if given is None and type(context) is int and context != found.max_position_embeddings:
        notes.append(
            f"the file's context of {context:,} tokens was taken, {name} has {found.max_position_embeddings:,}"
        )
        found.max_position_embeddings = fields["max_position_embeddings"] = context
    fields |= {"vocab_size": rows, "architectures": [family.architecture], "tie_word_embeddings": True}
    return FoundConfig(found, fields, name, notes)


def family_key(family: Family) -> str:
    """How the keys of a family's numbers begin."""
    assert family.gguf is not None
    return f"{family.gguf.architecture}."


def _sizes(file: GgufFile, family: Family) -> dict[str, int]:
    """The sizes of a file's model, by config.json's words."""
    start = family_key(family)
    usual: dict[str, Any] = {}
    if "attention.head_count" in {key.removeprefix(start) for key in file.fields}:
        heads = file.fields[f"{start}attention.head_count"]
        usual["attention.head_count_kv"] = heads  # as llama.cpp has it
    found = {}
    for key, name in SIZES.items():
        value = file.fields.get(start + key, usual.get(key))
        if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
            value = value[0].item()  # of each layer
        if type(value) is not int or value < 1:
            what = f"has no {start}{key}" if value is None else f"{start}{key} is no size of all layers"
            raise UserError(f"{file.path}: {what}; convert the model again")
        found[name] = value
    return found


def _rows(file: GgufFile) -> int:
    """Rows of the embedding, which config.json calls vocab_size."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"{file.path}: has no tensor token_embd.weight ({EMBEDDING}); convert the model again")
    return embedding.shape[0]


def _recorded(file: GgufFile, family: Family, sizes: Mapping[str, int], rows: int) -> PreTrainedConfig:
    """The config of the published size that a file has."""
    for preset in family.sizes.values():
        if all(preset.fields[key] == size for key, size in sizes.items()):
            return preset.config(vocab_size=rows)
    told = ", ".join(f"{key} {size}" for key, size in sizes.items())
    raise UserError(
        f"{file.path}: no published {family.label} has {told}; name the model's own config.json with --config"
    )


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as a config.json: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: cannot be read as a config.json: it is no JSON object")
    return found


def _read(path: Path, family: Family) -> PreTrainedConfig:
    """A config.json that the user named. Raises: UserError where it is none of the family's."""
    _json(path)
    try:
        config = read_config(path)
        if config.model_type != family.model_type:
            raise UserError(f"it is of a {config.model_type}, the file of a {family.model_type}")
        GemmaNumerics.from_config(config)
    except Exception as error:  # transformers raises many kinds
        why = first_line(error).removeprefix("config.json: ")
        raise UserError(f"{path}: cannot be taken for --config: {why}") from error
    return config


def _differences(file: GgufFile, family: Family, config: PreTrainedConfig) -> list[str]:
    """What a file says of the model's numbers otherwise than its config, as "key value, not value"."""
    start = family_key(family)
    expected = {f"{start}attention.causal": True, **_defaults(family, config), **hyperparameters(config)}
    left_out = {start + key for key in (*SIZES, CONTEXT, VOCABULARY)}
    found = []
    for key, value in expected.items():
        stored = file.fields.get(key)
        if stored is None or key in left_out or _same(stored, value):
            continue
        found.append(
            f"{key} {stored:g}, not {value:g}" if isinstance(stored, float) else f"{key} {stored}, not {value}"
        )
    return found


def _defaults(family: Family, config: PreTrainedConfig) -> dict[str, Any]:
    """What a file may say besides what ours do: other converters write it."""
    start, kinds = family_key(family), family.layers(config.to_dict())
    found: dict[str, Any] = {}
    full = family.rope("full_attention", config.to_dict())
    found |= {f"{start}rope.scaling.factor": full.factor}
    if full.type == "default":
        found |= {f"{start}rope.scaling.type": "none"}
    local = [kind.rope.theta for kind in kinds if kind.sliding_window is not None]
    if local:
        found |= {f"{start}rope.freq_base_swa": local[0]}
    return found


def _same(stored: Any, value: Any) -> bool:
    if isinstance(stored, float) and isinstance(value, int | float):
        return math.isclose(stored, value, rel_tol=CLOSE)
    return bool(stored == value)
