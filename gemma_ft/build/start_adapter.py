"""An adapter that training goes on from, and beside it its frozen copy, for objectives that compare with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gemma_ft.adapters.kinds import scores
from gemma_ft.adapters.lora import REFERENCE
from gemma_ft.build.located import Source, adapter_in, located, model_in
from gemma_ft.build.place import AdapterFiles, Place
from gemma_ft.build.pretrained import put_adapter
from gemma_ft.errors import UserError
from gemma_ft.recipe.schema import Adapter

KEY = "adapter.start"


def put_start(model: Any, settings: Adapter, source: Source, *, compared: bool) -> Any:
    """`model`, the base in `source`, with the adapter that `settings.start` names on it, ready to train in float32;
    `compared`: with a frozen copy of it as the adapter REFERENCE, which is off.

    Raises: UserError where there is none, it was trained on another base, or it is none that is trained here.
    """
    assert settings.start is not None
    files = start_of(settings.start)
    _check(files, settings)
    Place(source, None, files.folder, None).with_adapter(files.folder).check()
    model = put_adapter(model, files, dropout=settings.dropout, training=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    active = model.peft_config["default"]
    active.base_model_name_or_path, active.revision, active.inference_mode = source.name, source.revision, False
    active.target_modules = sorted(active.target_modules)
    if compared:
        put_adapter(model, files, name=REFERENCE, training=True)
        model.set_adapter("default")
        wide = {name: one for name, one in model.named_parameters() if f".{REFERENCE}." in name}
        for parameter in wide.values():
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return model


def start_of(start: str) -> AdapterFiles:
    """The adapter that `adapter.start` names. Raises: UserError where there is none."""
    folder = Path(located(start))
    found = adapter_in(folder)
    if found is None:
        whole = model_in(folder) if folder.is_dir() else None
        cure = f"it is a whole model: set model.weights to {whole}" if whole else "name a run or a PEFT adapter folder"
        raise UserError(f"{KEY}: {start}: no adapter in it; {cure}")
    return AdapterFiles(found)


def _check(files: AdapterFiles, settings: Adapter) -> None:
    """Raises: UserError for an adapter that is no LoRA, or other than the recipe says."""
    config, folder = files.config, files.folder
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise UserError(f"{KEY}: {folder}: a {config.peft_type} adapter; training goes on from LoRA")
    if scores(config):
        raise UserError(
            f"{KEY}: {folder}: a reward model's, which was never trained to answer; name an adapter that was"
        )
    if getattr(config, "trainable_token_indices", None) or getattr(config, "modules_to_save", None):
        raise UserError(f"{KEY}: {folder}: trains more than LoRA's factors (added tokens or whole modules); merge it "
                        "(gemma-ft merge), and set model.weights to the result")  # fmt: skip
    own = {
        "rank": config.r,
        "alpha": float(config.lora_alpha),
        "rslora": bool(config.use_rslora),
        "dora": bool(config.use_dora),
    }
    default = Adapter()
    for key, value in own.items():
        said = getattr(settings, key)
        if said not in (value, getattr(default, key)):
            told, has = (str(one).lower() if isinstance(one, bool) else f"{one:g}" for one in (said, value))
            raise UserError(f"adapter.{key}: {told}, and {KEY} has {has}; take it out of the recipe")
    targets = settings.targets
    if targets != default.targets and set(targets) != {name.rpartition(".")[2] for name in _targets(config)}:
        raise UserError(f"adapter.targets: other layers than {KEY} has; take it out of the recipe")


def _targets(config: Any) -> list[str]:
    """The layers that an adapter names, in whatever form."""
    named = config.target_modules
    return [named] if isinstance(named, str) else list(named)
