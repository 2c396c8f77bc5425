"""How far a merged reward model is from the live one, and how far it may be: of a number there is no distribution."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemma_ft.adapters.lora import adapter_off
from gemma_ft.adapters.trainable_tokens import native_of
from gemma_ft.errors import NonFiniteError
from gemma_ft.export.merge.certificate_prompts import CertificatePrompt


@dataclass(frozen=True)
class Limit:
    """What is bounded, and by how much; docs/merging.md says why."""

    measure: str  # a field of what was measured
    at_most: float
    why: str


REWARD_FLOAT32 = Limit("relative_dreward", 2e-5, "float32 on both sides")
REWARD_ROUNDED = Limit("relative_dreward", 0.1, "weights rounded to bf16")
REWARD_REQUANTIZED = Limit("relative_dreward", 0.5, "trained over quantized weights, merged into others")


@dataclass(frozen=True)
class RewardDistance:
    """How far the rewards of the merged model are from those of the live one, read at every compared position."""

    mean_abs_dreward: float
    max_abs_dreward: float
    relative_dreward: float  # the mean difference over the spread (standard deviation) of the live rewards


@torch.no_grad()
def reward_distance(
    live: Any, merged: Any, prompts: Sequence[CertificatePrompt], *, without: bool = False, on_row: Any = None
) -> RewardDistance:
    """Differences of two reward models over the prompts, in float64. `without`: the live one without its adapter.

    Raises: NonFiniteError, for `max` would let a NaN through as no difference.
    """
    before, after = [], []
    for prompt in prompts:
        with adapter_off(live) if without else contextlib.nullcontext():
            before.append(_rewards(live, prompt))
        after.append(_rewards(merged, prompt))
        if on_row is not None:
            on_row()
    one, other = torch.cat(before), torch.cat(after)
    for side, found in (("live", one), ("merged", other)):
        if not bool(found.isfinite().all()):
            raise NonFiniteError(f"the rewards of the {side} model are not finite; look for a damaged adapter or base")
    gap, spread = (one - other).abs(), float(one.std()) if len(one) > 1 else 0.0
    mean = float(gap.mean())
    return RewardDistance(mean, float(gap.max()), mean / spread if spread else float(bool(mean)))


def hidden_states(model: Any, prompt: CertificatePrompt) -> Tensor:
    """Final hidden states of the prompt's positions [positions, D]."""
    native = native_of(model)
    ids = torch.tensor([prompt.ids], device=native.device)
    found: Tensor = native.model(input_ids=ids, use_cache=False).last_hidden_state[0, prompt.positions]
    return found


def _rewards(model: Any, prompt: CertificatePrompt) -> Tensor:
    """The reward read at each position of the prompt [positions], float64 on the CPU."""
    found: Tensor = native_of(model).score(hidden_states(model, prompt))[:, 0].double().cpu()
    return found
