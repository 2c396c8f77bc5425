"""Low-rank adapters around a model, through PEFT: LoRA (arXiv:2106.09685), rsLoRA (2312.03732), DoRA (2402.09353)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gemma_ft.adapters.kinds import REWARD_TASK
from gemma_ft.adapters.trainable_tokens import add_to_folder, indices, rows_of, weight_name
from gemma_ft.families.family import REWARD_HEAD

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


REFERENCE = "reference"  # the name of a frozen adapter that the trained one is compared with


def add_adapter(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: str | Sequence[str],
    rslora: bool,
    dora: bool,
    init: str,
    base: str,
    revision: str | None,
    reward: bool = False,
) -> PeftModel:
    """Wrap `model` with a fresh adapter whose output equals the base's (B = 0), all of its weights in float32.

    `targets`: "all-linear" (every linear layer but the head) or module names. `base` and `revision` are written to
    adapter_config.json: a hub id with its commit, or an absolute folder, so that stock PEFT finds the base again. The
    rows of added tokens are trained with it. `reward`: `model` is a reward model, whose head is trained and saved as it
    is.
    """
    from peft import LoraConfig, get_peft_model  # seconds, which verbs without an adapter need not wait for

    from gemma_ft.adapters.fused_layers import with_fused_layers

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=rslora,
        use_dora=dora,
        init_lora_weights=True if init == "default" else init,
        task_type=REWARD_TASK if reward else "CAUSAL_LM",
    )
    wrapped = get_peft_model(model, with_fused_layers(config))
    active = wrapped.peft_config["default"]
    active.base_model_name_or_path, active.revision = base, revision
    active.target_modules = sorted(
        active.target_modules
    )  # a set has another order in each process, and so would the file
    if reward:
        active.modules_to_save = [REWARD_HEAD]  # PEFT has other classes' names in it, and this one
    rows = rows_of(wrapped)
    if rows is not None:  # said after PEFT has wrapped the model, so that it adds no layer of its own for them
        active.trainable_token_indices = indices(rows.first, len(rows.weight))
        rows.requires_grad_(True)
    trainables_in_float32(wrapped)
    return wrapped


@contextlib.contextmanager
def reference_on(model: Any) -> Iterator[None]:
    """The adapter REFERENCE instead of the trained one while this is open; every parameter requires a gradient as it
    did before, then and afterwards.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.set_adapter(REFERENCE)
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        model.set_adapter("default")
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """The base alone while this is open; afterwards every parameter requires a gradient exactly as it did before.

    PEFT's own context freezes the adapter's weights on the way in, and on the way out makes all of them trainable.
    Added tokens have the rows that they began with.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    rows = rows_of(model)
    try:
        if rows is not None:
            rows.enabled = False
        with model.disable_adapter():
            yield
    finally:
        if rows is not None:
            rows.enabled = True
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def trainables_in_float32(model: nn.Module) -> dict[str, torch.Tensor]:
    """Cast every trainable parameter to float32 (float64 stays), freeze nothing, and return name -> a copy of its
    value.

    The copies let a caller undo a library that narrows the trainables: see `restore_trainables`.
    """
    values = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            values[name] = parameter.detach().clone()
    return values


def restore_trainables(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Put back the values and dtypes of `trainables_in_float32`.

    TRL rounds LoRA's A and B over a quantized base to bf16 (and leaves DoRA's magnitude): small updates are then lost,
    and FSDP2 wants one dtype among the trainables of a group.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = values[name].to(parameter.device)


def save_adapter(model: PeftModel, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write a plain PEFT folder (adapter_config.json, adapter_model.safetensors). Never asks the hub anything.

    `weights`: the model's own by name, where it has no more than slices of them.
    """
    options: dict[str, Any] = {"save_embedding_layers": False, "selected_adapters": ["default"]}
    model.save_pretrained(str(folder), safe_serialization=True, state_dict=weights, **options)
    rows = rows_of(model)
    if rows is not None:
        trained = rows.weight if weights is None else weights[weight_name(model, rows)]
        add_to_folder(folder, trained, rows.initial)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
