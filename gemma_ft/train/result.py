"""The result of a run as a folder that stock libraries open: a PEFT adapter, or a whole transformers model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gemma_ft.adapters.adapter_config import read_fields
from gemma_ft.adapters.class_names import rename_folder
from gemma_ft.adapters.lora import save_adapter
from gemma_ft.adapters.trainable_tokens import rows_of, weight_name
from gemma_ft.build.contract import adapter_hash, contract_of, stop_ids_in
from gemma_ft.build.located import Source, folder_of
from gemma_ft.build.text_weights import model_weights, others_fingerprint
from gemma_ft.build.weights import EMBEDDING, HEAD, dtype_name
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.tokenizer_files import save_tokenizer
from gemma_ft.model.config import numerics_hash
from gemma_ft.model.config_file import composite_in
from gemma_ft.model.reward import HEAD_WEIGHT, RewardHead
from gemma_ft.recipe.schema import Recipe
from gemma_ft.system import hardware
from gemma_ft.system.files import commit_folder, write_json
from gemma_ft.train.checkpoint_state import trained
from gemma_ft.train.distributed import World
from gemma_ft.train.fsdp import whole
from gemma_ft.train.run_dir import RunDir


def save_result(
    run: RunDir,
    recipe: Recipe,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    encoder: ChatEncoder,
    source: Source | None,
    world: World,
) -> Path:
    """Write `adapter/`, or `model/` for strategy full, complete or not at all; returns the folder. All ranks call it.

    Beside the weights lie the tokenizer with the chat template that was trained, and gemma_ft.json with what whoever
    serves the model must keep to: template hash, stop ids, system policy, one BOS.
    """
    full = recipe.strategy == "full"
    contract = contract_of(
        encoder,
        base=source.name if source else None,
        revision=source.revision if source else None,
        base_sha256=base_fingerprint(source),
        others_sha256=others_fingerprint(folder_of(source, downloaded=True)) if source else None,
        preset=recipe.model.preset,
        quantize=recipe.quantize.kind if recipe.quantize else None,
        double_quant=recipe.quantize.double_quant if recipe.quantize else True,
        precision=recipe.train.precision,
        numerics_sha256=numerics_hash(model.config),
    )

    # Of a sharded model rank 0 gathers what is saved: an adapter, or one copy of all weights.
    dtype = hardware.dtype_by_name(recipe.train.precision) if full else None
    gathered = gathered_weights(model, world, dtype) if world.layout == "fsdp2" else None
    target = run.model if full else run.adapter
    if not world.main:
        return target

    def write(folder: Path) -> None:
        if full:
            own = stop_ids_in(folder_of(source, downloaded=True)) if source else []
            ends = encoder.but(stop_ids=own).stop_ids
            if model.can_generate():
                model.generation_config.eos_token_id = ends  # Trainer sets it to the tokenizer's eos alone
            weights = _in_one_table(model, gathered)
            rows = rows_of(model)
            vocab_size = model.config.vocab_size + (0 if rows is None else len(rows.weight))
            model.save_pretrained(str(folder), state_dict=weights)
            # the library writes the dtype of the slices, float32, and the base's size
            if weights is not None and dtype is not None:
                config = folder / "config.json"
                fields = json.loads(config.read_text(encoding="utf-8"))
                said = {"dtype": dtype_name(dtype), "vocab_size": vocab_size}
                write_json(config, fields | said)
        else:
            save_adapter(model, folder, gathered)
            composite = composite_in(folder_of(source, downloaded=True)) if source else None
            if composite is not None:
                rename_folder(folder, composite)
        save_tokenizer(tokenizer, folder, system_policy=encoder.trained_policy)
        sealed = contract if full else replace(contract, adapter_sha256=adapter_hash(folder, read_fields(folder)))
        sealed.write(folder)

    commit_folder(target, write, manifest=False)
    return target


def _in_one_table(model: Any, weights: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """A fully trained model's weights by name, the rows of added tokens behind those of the embedding; None where its
    own are what is to be saved.
    """
    rows = rows_of(model)
    if rows is None:
        return weights
    found = dict(model.state_dict() if weights is None else weights)
    added = found.pop(weight_name(model, rows))
    found[EMBEDDING] = torch.cat((found[EMBEDDING], added.to(found[EMBEDDING])))
    found.pop(HEAD, None)  # the same
    return found


def base_fingerprint(source: Source | None) -> str | None:
    """What tells the base from others; None for fresh weights."""
    return model_weights(folder_of(source, downloaded=True)).fingerprint() if source else None


@torch.no_grad()
def round_weights(model: Any, dtype: torch.dtype, world: World) -> None:
    """Give the weights of a fully trained model the dtype that they are saved in; the head of a reward model stays as
    it is. The slices of a sharded one, whose dtype FSDP keeps, are rounded to it.
    """
    if world.layout != "fsdp2":
        for module in model.children():
            if not isinstance(module, RewardHead):
                module.to(dtype)
        return
    parameters: dict[str, Any] = trained(model)
    parameters.pop(HEAD_WEIGHT, None)
    for parameter in parameters.values():
        local = parameter.to_local()
        local.copy_(local.to(dtype))


def gathered_weights(model: Any, world: World, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Whole trainable weights by name on rank 0's CPU, in `dtype` (None: their own); a tensor at a time, so that other
    ranks hold no more than one.
    """
    found = {}
    for name, parameter in trained(model).items():
        value = whole(parameter.detach())
        if world.main:
            kept = dtype is None or name == HEAD_WEIGHT
            found[name] = value.to(device="cpu", dtype=value.dtype if kept else dtype)
    return found
