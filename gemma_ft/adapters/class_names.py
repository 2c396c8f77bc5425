"""The names of an adapter's tensors and modules where its base is a folder of several models: in the file those of the
class that the folder names, so that transformers, PEFT and vLLM find their modules; here those of a text model alone.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from gemma_ft.adapters.adapter_config import read_fields
from gemma_ft.adapters.kinds import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from gemma_ft.families.family import LINEARS, Composite
from gemma_ft.families.records import COMPOSITES
from gemma_ft.system.files import write_json

PREFIX = "base_model.model."  # of PEFT's wrapper
_NAMING = ("rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices", "target_parameters")
_WITHIN = "language_model"  # what every prefix of a text model holds
_SPELLED = re.compile(r"\^?(?:model\\?\.)?language_model\\?\.(?:model\\?\.)?")  # in a name, or a pattern of names
_OURS = re.compile(r"\^?model\\?\.(?=layers|embed_tokens)")


def native_key(name: str) -> str | None:
    """The name of an adapter's tensor here; None for one that changes another model of the folder."""
    inner = name.removeprefix(PREFIX)
    for composite in COMPOSITES.values() if inner != name else ():
        native = composite.native(inner)
        if native is None:
            return None
        if _WITHIN in inner and native != inner:
            return PREFIX + native
    return name


def key_mapping() -> dict[str, str]:
    """The same as PEFT takes it, for names without its own prefix."""
    return {pattern: name for composite in COMPOSITES.values() for pattern, name in composite.key_mapping.items()}


def native_config(config: Any, names: Callable[[], Iterable[str]]) -> Any:
    """PEFT's config of an adapter, so that it finds in a text model alone what the adapter changes. `names`: of its
    tensors, as they are in the file; asked for only where the config may be of another class.
    """
    said = [getattr(config, key, None) for key in ("target_modules", *_NAMING)]
    if not isinstance(said[0], str) and _WITHIN not in repr(said):
        return config
    stored = list(names())
    if not any(native_key(name) != name for name in stored):
        return config
    config = copy.copy(config)
    modules = _modules(native_key(name) or name for name in stored)
    if modules:  # each by name: a pattern was made for other names
        config.target_modules = set(modules)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    for key in _NAMING:
        setattr(config, key, _renamed(getattr(config, key, None), _SPELLED, "model."))
    return config


def rename_folder(folder: Path, composite: Composite) -> None:
    """Give the adapter in a folder, as PEFT has written it for a text model alone, the names of the composite's class.
    Its targets are then found in the text model and nowhere else: a vision tower has a q_proj too.
    """
    path = folder / ADAPTER_WEIGHTS
    tensors = {_outward(name, composite): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    fields = read_fields(folder)
    for key in _NAMING:
        if fields.get(key):
            fields[key] = _renamed(fields[key], _OURS, composite.text_prefix)
    fields["target_modules"] = _targets(fields.get("target_modules"), _modules(tensors), composite)
    if fields.get("modules_to_save"):
        fields["modules_to_save"] = _whole(fields["modules_to_save"], tensors)
    write_json(folder / ADAPTER_CONFIG, fields)


def _outward(name: str, composite: Composite) -> str:
    return PREFIX + composite.outward(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else name


def _modules(names: Iterable[str]) -> list[str]:
    """The modules that have low-rank factors among an adapter's tensors."""
    return sorted({name.removeprefix(PREFIX).partition(".lora_")[0] for name in names if ".lora_" in name})


def _targets(said: Any, modules: Sequence[str], composite: Composite) -> Any:
    """What target_modules becomes: a pattern where it named linear layers of every decoder layer, else each module."""
    if isinstance(said, list) and said and set(said) <= set(LINEARS):
        # its one group stands at the end, where vLLM looks for the names of layers
        return rf"{re.escape(composite.text_prefix)}.*\.({'|'.join(sorted(said))})"
    return list(modules) or said


def _whole(said: Sequence[str], names: Iterable[str]) -> list[str]:
    """Modules that are saved whole, by their full names where the adapter holds them."""
    held = {name.removeprefix(PREFIX).rpartition(".")[0] for name in names if ".lora_" not in name}
    found = sorted(one for one in held if any(f".{one}".endswith(f".{module}") for module in said))
    return found or list(said)


def _renamed(value: Any, pattern: re.Pattern[str], prefix: str) -> Any:
    """`value` with names put for names: of a list, or of the keys of a table."""
    if isinstance(value, Mapping):
        return {pattern.sub(prefix, key): one for key, one in value.items()}
    named = isinstance(value, list | set | tuple) and all(isinstance(one, str) for one in value)
    return [pattern.sub(prefix, one) for one in value] if named else value  # else ids of tokens
