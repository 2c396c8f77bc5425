"""The config of an adapter that was saved by PEFT, looked at before anything is made of it."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from gemma_ft.adapters.kinds import ADAPTER_CONFIG, lora_fault, type_fault
from gemma_ft.adapters.trainable_tokens import HEAD, LAYER
from gemma_ft.errors import UserError, first_line


def adapter_config(adapter: Path, fields: Mapping[str, Any] | None = None) -> Any:
    """PEFT's config of an adapter that is computed here as PEFT computes it (adapters/kinds.py). `fields`: what
    `read_fields` gave for the folder, where that was called before.

    Raises: UserError for other kinds; for what a newer PEFT wrote and this one would drop; and for ranks and alphas
    that are none, which PEFT takes as they are.
    """
    path = adapter / ADAPTER_CONFIG
    said = dict(read_fields(adapter) if fields is None else fields)
    fault = type_fault(said["peft_type"]) if isinstance(said.get("peft_type"), str) else None
    if fault is not None:
        raise UserError(f"{path}: {fault}")
    from peft import LoraConfig, PeftConfig

    try:
        # as PeftConfig.from_pretrained makes one, but of what was read already
        kept = {key: copy.deepcopy(value) for key, value in said.items() if key != "runtime_config"}
        config = PeftConfig.from_peft_type(**PeftConfig.check_kwargs(**kept))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, ImportError) as error:
        raise UserError(f"{path}: cannot be read as a PEFT adapter: {first_line(error)}") from error
    fault = _newer_fault(said, config) or (lora_fault(config) if isinstance(config, LoraConfig) else None)
    if fault is not None:
        raise UserError(f"{path}: {fault}")
    if not isinstance(config, LoraConfig):  # rows of tokens alone
        return config
    fault = (
        _rank_fault("r", config.r)
        or _alpha_fault("lora_alpha", config.lora_alpha)
        or _pattern_fault("rank_pattern", config.rank_pattern, _rank_fault)
        or _pattern_fault("alpha_pattern", config.alpha_pattern, _alpha_fault)
    )
    if fault is not None:
        raise UserError(f"{path}: {fault}; fetch it again")
    return config


def read_fields(adapter: Path) -> dict[str, Any]:
    """What the adapter_config.json of a folder says, as it stands there.

    Raises: UserError when it cannot be read, or is no JSON object.
    """
    path = adapter / ADAPTER_CONFIG
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as a PEFT adapter: {first_line(error)}") from error
    if not isinstance(said, dict):
        raise UserError(f"{path}: cannot be read as a PEFT adapter: it holds no JSON object")
    return said


def for_loading(config: Any) -> Any:
    """`config`, so that PEFT gives its layers no start of their own (a decomposition of each weight, for some), which
    the weights of the file then overwrite.
    """
    if isinstance(getattr(config, "init_lora_weights", None), str):
        config.init_lora_weights = True
    return config


def saved_base_weights(names: Iterable[str], config: Any) -> list[str]:
    """Of the tensors of an adapter those that are weights of its base, which PEFT saves beside what it trained: the
    embedding where it is a target or was resized, and biases that were trained in place.
    """
    whole = {one.rpartition(".")[2] for one in getattr(config, "modules_to_save", None) or ()}
    apart = bool(whole & {LAYER, HEAD})  # then these are what was trained
    biased = getattr(config, "bias", "none") != "none"
    found = []
    for name in names:
        module, _, kind = name.rpartition(".")
        table = module.removesuffix(".base_layer").rpartition(".")[2] in (LAYER, HEAD) and kind == "weight"
        if (table and (module.endswith(".base_layer") or not apart)) or (
            biased and kind == "bias" and ".lora_" not in name
        ):
            found.append(name)
    return found


def resized_fault(shapes: Mapping[str, tuple[int, ...]], vocab_size: int) -> str | None:
    """What is to be told of an adapter that holds an embedding or a head of another vocabulary than its base's, or
    None. shapes: of its tensors, by name.
    """
    for name, shape in shapes.items():
        whole = name.endswith(".weight") and ".lora_" not in name
        if whole and {LAYER, HEAD} & set(name.split(".")) and len(shape) == 2 and shape[0] != vocab_size:
            return (
                f"holds an embedding of {shape[0]:,} tokens, its base has {vocab_size:,}: the vocabulary was resized; "
                f"in PEFT, call resize_token_embeddings({shape[0]}) on the base, put the adapter on it, merge it "
                "(merge_and_unload), and give the merged folder"
            )
    return None


def _newer_fault(said: dict[str, Any], config: Any) -> str | None:
    """What a newer PEFT set that this one does not know, and would leave out of the computation; or None."""
    from peft import __version__

    version = said.get("peft_version")
    known = {one.name for one in dataclasses.fields(config)}
    unknown = next((key for key, value in said.items() if key not in known and value), None)
    if unknown is None or not isinstance(version, str) or _numbers(version) <= _numbers(__version__):
        return None
    return f"{unknown}: was set by PEFT {version}, {__version__} does not know it; install that PEFT"


def _numbers(version: str) -> list[int]:
    return [int(one) for one in re.findall(r"\d+", version)[:3]]


def _rank_fault(key: str, value: Any) -> str | None:
    """Why a value is no rank, or None."""
    fits = type(value) is int and 1 <= value <= sys.maxsize
    return None if fits else f"{key}: expected a whole number from 1, got {value!r}"


def _alpha_fault(key: str, value: Any) -> str | None:
    """Why a value is no alpha, or None."""
    greatest = sys.float_info.max
    fits = type(value) in (int, float) and -greatest <= value <= greatest
    return None if fits else f"{key}: expected a finite number, got {value!r}"


def _pattern_fault(key: str, patterns: Any, fault_of: Callable[[str, Any], str | None]) -> str | None:
    """What is wrong with the ranks or alphas of single modules, or None."""
    if not isinstance(patterns, dict):
        return f"{key}: expected a pattern of names for each value, got {patterns!r}"
    from peft.utils.other import get_pattern_key

    for pattern, value in patterns.items():
        try:
            get_pattern_key([pattern], "")  # compiles what PEFT makes of it
        except (re.error, OverflowError, RecursionError):
            return f"{key}: {pattern!r} is no pattern of names"
        fault = fault_of(f"{key}: {pattern}", value)
        if fault is not None:
            return fault
    return None
