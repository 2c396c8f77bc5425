"""Amplified tiny models that say something: a tied head repeats the last token for ever unless the final norm turns
the states away from it, and answers of one token would hide most faults.
"""

from __future__ import annotations

from typing import Any

import torch

from gemma_ft.model.gemma import GemmaForCausalLM
from tests.parity.amplified import ours, reference


def lively(shape: str, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> GemmaForCausalLM:
    """Our tiny model of a shape."""
    return _turned(ours(shape, **overrides)).to(dtype)


def lively_reference(shape: str, **overrides: Any) -> Any:
    """transformers' model with the same weights."""
    return _turned(reference(shape, **overrides))


def _turned(model: Any) -> Any:
    with torch.no_grad():
        weight = model.model.norm.weight
        weight.copy_(
            2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) - 1
        )  # 1 + w: either sign
    return model
