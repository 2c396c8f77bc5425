"""The config of an adapter that was saved by PEFT, looked at before anything is made of it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemma_ft.errors import UserError, first_line


def adapter_config(adapter: Path) -> Any:
    """PEFT's config of a LoRA, rsLoRA or DoRA adapter, which live wholly in the layers that they wrap.

    Raises: UserError for other kinds, whose work is done by PEFT's wrapper around the model, and would be lost; and for
    ranks and alphas that are none, which PEFT takes as they are.
    """
    from peft import LoraConfig, PeftConfig

    path = adapter / "adapter_config.json"
    try:
        config = PeftConfig.from_pretrained(str(adapter))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as a PEFT adapter: {first_line(error)}") from error
    kind = getattr(config.peft_type, "value", config.peft_type)
    if not isinstance(config, LoraConfig) or kind != "LORA":
        raise UserError(f"{path}: a {kind} adapter is not supported; only LoRA, rsLoRA and DoRA are")
    odd = next((name for name in ("alora_invocation_tokens", "layer_replication") if getattr(config, name, None)), None)
    if odd is not None:
        raise UserError(f"{path}: {odd} is set, which is not supported; only plain LoRA, rsLoRA and DoRA are")
    fault = (
        _rank_fault("r", config.r)
        or _alpha_fault("lora_alpha", config.lora_alpha)
        or _pattern_fault("rank_pattern", config.rank_pattern, _rank_fault)
        or _pattern_fault("alpha_pattern", config.alpha_pattern, _alpha_fault)
    )
    if fault is not None:
        raise UserError(f"{path}: {fault}; fetch it again")
    return config


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
