"""The certificate of a merge: how far the merged model is from the live one, the adapter on the base as it was trained.

Both answer the same prompts; their next-token distributions are compared at every position of the answers. Logits exist
for a few positions at a time and are never stored. Two models are in memory at once. P live, Q merged, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from gemma_ft.adapters.lora import adapter_off
from gemma_ft.adapters.trainable_tokens import native_of, rows_of
from gemma_ft.build.located import Source
from gemma_ft.build.pretrained import load_base, put_adapter
from gemma_ft.build.weights import dtype_name
from gemma_ft.errors import NonFiniteError, UserError
from gemma_ft.export.merge.certificate_prompts import CertificatePrompt, certificate_prompts
from gemma_ft.export.merge.certificate_reward import (
    REWARD_FLOAT32,
    REWARD_REQUANTIZED,
    REWARD_ROUNDED,
    Limit,
    hidden_states,
    reward_distance,
)
from gemma_ft.export.merge.merge import Progress, merge_into
from gemma_ft.export.merge.merged import MergedWeights
from gemma_ft.model.added_rows import AddedRows

POSITIONS_AT_ONCE = 64  # of float64 logits: 130 MB for Gemma's vocabulary


class BeyondLimit(UserError):
    """The merged model is further from the live one than it may be; `certificate` says how far."""

    exit_code = 1

    def __init__(self, message: str, certificate: dict[str, Any]) -> None:
        super().__init__(message)
        self.certificate = certificate


# docs/merging.md holds what each was measured to cost.
FLOAT32 = Limit("relative_dlogit", 5e-6, "float32 on both sides")
ROUNDED = Limit("mean_kl", 5e-3, "weights rounded to bf16")
REQUANTIZED = Limit("mean_kl", 0.1, "trained over quantized weights, merged into others")


@dataclass(frozen=True)
class Distance:
    """How far Q is from P over all compared positions; KL in nats per token."""

    mean_kl: float
    max_kl: float
    max_abs_dlogit: float
    relative_dlogit: float  # max |dlogit| over the largest |logit| of P
    top1_agreement: float  # share of positions where both find the same token most likely


@torch.no_grad()
def distance(
    live: Any, merged: Any, prompts: Sequence[CertificatePrompt], *, without: bool = False, on_row: Any = None
) -> Distance:
    """KL(P || Q), logit differences and agreement of two models over the prompts, in float64.

    `without`: P without its adapter. Raises: NonFiniteError, for `max` would let a NaN through as no difference.
    """
    kl_sum = kl_max = dlogit = largest = 0.0
    agreed = count = 0
    for prompt in prompts:
        with adapter_off(live) if without else contextlib.nullcontext():
            hidden_p = hidden_states(live, prompt)
        hidden_q = hidden_states(merged, prompt)
        for start in range(0, len(prompt.positions), POSITIONS_AT_ONCE):
            rows = slice(start, start + POSITIONS_AT_ONCE)
            with adapter_off(live) if without else contextlib.nullcontext():
                p = _logits(live, hidden_p[rows])
            q = _logits(merged, hidden_q[rows]).to(p.device)
            _check_finite(live=p, merged=q)
            log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)  # [rows]
            kl_sum, kl_max = kl_sum + float(kl.sum()), max(kl_max, float(kl.max()))
            dlogit = max(dlogit, float((p - q).abs().max()))
            largest = max(largest, float(p.abs().max()))
            agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
            count += len(kl)
        if on_row is not None:
            on_row()
    return Distance(kl_sum / count, kl_max, dlogit, dlogit / largest, agreed / count)


def certify(
    merged: MergedWeights, folder: Path, *, prompts: int, on_progress: Progress | None = None
) -> dict[str, Any]:
    """The certificate of the merged `folder`, as merge.json holds it.

    Beside the merge itself it measures the other policy where there is one (merged in memory), and what quantizing the
    base cost before any adapter. Raises: BeyondLimit.
    """
    chosen = certificate_prompts(merged, prompts)
    other = merged.other_policy()
    total, done = len(chosen.prompts) * (3 if other is not None else 1), 0

    def on_row() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, total)

    precision, reward = merged.precision, merged.place.reward
    measured = reward_distance if reward else distance
    live = live_model(merged)
    model = _plain(Source(str(folder.resolve()), None), torch.promote_types(precision, merged.dtype), reward)
    found = measured(live, model, chosen.prompts, on_row=on_row)
    beside: dict[str, Any] = {}
    alone = None
    if other is not None:
        del model
        model = _plain(merged.place.base, torch.promote_types(precision, merged.dtype), reward)
        rows = rows_of(live)
        if rows is not None:  # the prompts may hold their tokens
            model.model.added_rows = AddedRows(rows.first, rows.initial)
        alone = measured(live, model, chosen.prompts, without=True, on_row=on_row)
        merge_into(model, other)
        beside[other.policy] = asdict(measured(live, model, chosen.prompts, on_row=on_row))
        beside["base"] = asdict(alone)
    limit = reward_limit(merged) if reward else limit_for(merged, alone if chosen.random else None)  # type: ignore[arg-type]
    value = getattr(found, limit.measure)
    certificate = {
        "prompts": len(chosen.prompts),
        "positions": sum(len(prompt.positions) for prompt in chosen.prompts),
        "rows": chosen.source,
        "live": {"quantize": merged.stored.kind if merged.stored else None, "compute": dtype_name(precision)},
        "merged": asdict(found),
        "compared": beside,
        "limit": asdict(limit),
        "passed": bool(value <= limit.at_most),
    }
    if not certificate["passed"]:
        raise BeyondLimit(
            f"the merged model is too far from the trained one: {limit.measure} {value:.3g}, "
            f"at most {limit.at_most:.3g} ({limit.why}); nothing was written; {_cure(merged, limit)}, "
            "or --prompts 0 writes it without a certificate",
            certificate,
        )
    return certificate


def limit_for(merged: MergedWeights, on_random: Distance | None = None) -> Limit:
    """What a merge is held to: by what was trained, and what is written.

    `on_random`: what quantizing the base alone cost on random tokens. No model is sure of anything there, so that it
    may cost more than the limit for answers: a merge is then held to twice of it.
    """
    stored = merged.stored
    if stored is not None and (merged.policy == "original" or stored.kind == "int8"):
        if on_random is not None and 2 * on_random.mean_kl > REQUANTIZED.at_most:
            return Limit("mean_kl", 2 * on_random.mean_kl, "random tokens: twice what quantizing the base costs there")
        return REQUANTIZED
    return FLOAT32 if is_exact(merged) else ROUNDED


def reward_limit(merged: MergedWeights) -> Limit:
    """As `limit_for`, of a reward model."""
    if merged.stored is not None and (merged.policy == "original" or merged.stored.kind == "int8"):
        return REWARD_REQUANTIZED
    return REWARD_FLOAT32 if is_exact(merged) else REWARD_ROUNDED


def is_exact(merged: MergedWeights) -> bool:
    """Whether nothing of a merge is narrower than float32."""
    dtypes = (merged.precision, *(one for one, _ in merged.infos.values()))
    return all(torch.finfo(kept).bits >= 32 for kept in dtypes)


def live_model(merged: MergedWeights) -> Any:
    """The adapters of a merge on its base as they were trained, in eval mode: quantized as then, in that precision, put
    on by what serves and evaluates them.

    The base is loaded as for training: what is packed for speed rounds its arithmetic to bf16.
    """
    stored = merged.stored
    model = load_base(
        merged.place.base,
        dtype=merged.precision,
        quantize=stored.kind if stored else None,
        double_quant=stored.double_quant if stored else True,
        reward=merged.place.reward,
    )
    names = [f"adapter_{number}" for number in range(len(merged.adapters))]
    for name, adapter in zip(names, merged.adapters, strict=True):
        model = put_adapter(model, adapter.opened, name=name)
    model.base_model.set_adapter(names)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, adapter in zip(names, merged.adapters, strict=True):
                if name in module.scaling:
                    module.scaling[name] *= adapter.share
    return model.eval()


def _plain(source: Source, dtype: torch.dtype, reward: bool) -> Any:
    return load_base(source, dtype=dtype, trainable=False, reward=reward).eval()


def _logits(model: Any, hidden: Tensor) -> Tensor:
    return native_of(model).head_logits(hidden).double()


def _check_finite(**logits: Tensor) -> None:
    """Raises NonFiniteError naming the first side whose logits are not finite."""
    for side, found in logits.items():
        if not bool(found.isfinite().all()):
            raise NonFiniteError(
                f"the logits of the {side} model are not finite; give the adapter a smaller weight, or look for a "
                "damaged adapter or base"
            )


def _cure(merged: MergedWeights, limit: Limit) -> str:
    if limit in (ROUNDED, REWARD_ROUNDED) and all(torch.finfo(kept).bits >= 32 for kept, _ in merged.infos.values()):
        return f"it was trained in {dtype_name(merged.precision)}: train with train.precision=float32"
    if limit in (ROUNDED, REWARD_ROUNDED):
        return "try --dtype f32"
    if limit in (FLOAT32, REWARD_FLOAT32):
        return "this is more than rounding: look for a damaged adapter or base"
    if merged.policy == "original":
        return "try --base dequantized"
    return "int8 rounds activations too, which no weights can repeat: train over nf4"
