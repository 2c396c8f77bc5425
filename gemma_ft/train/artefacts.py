"""The result of a run as a folder that stock libraries open: a PEFT adapter, or a whole transformers model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from gemma_ft.adapters.lora import save_adapter
from gemma_ft.checkpoint import commit_folder
from gemma_ft.contract import adapter_hash, contract_of
from gemma_ft.data.chat import ChatEncoder
from gemma_ft.data.tokenizer_files import save_tokenizer
from gemma_ft.model.config import numerics_hash
from gemma_ft.recipe.schema import Recipe
from gemma_ft.train.run_dir import RunDir
from gemma_ft.weights import Source, WeightFiles, folder_of


def save_result(
    run: RunDir,
    recipe: Recipe,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    encoder: ChatEncoder,
    source: Source | None,
) -> Path:
    """Write `adapter/`, or `model/` for strategy full, complete or not at all; returns the folder.

    Beside the weights lie the tokenizer with the chat template that was trained, and gemma_ft.json with what whoever
    serves the model must keep to: template hash, stop ids, system policy, one BOS.
    """
    full = recipe.strategy == "full"
    contract = contract_of(
        encoder,
        base=source.name if source else None,
        revision=source.revision if source else None,
        base_sha256=WeightFiles.open(folder_of(source, downloaded=True)).fingerprint() if source else None,
        preset=recipe.model.preset,
        quantize=recipe.quantize.kind if recipe.quantize else None,
        double_quant=recipe.quantize.double_quant if recipe.quantize else True,
        precision=recipe.train.precision,
        numerics_sha256=numerics_hash(model.config),
    )

    def write(folder: Path) -> None:
        if full:
            model.generation_config.eos_token_id = encoder.stop_ids  # Trainer sets it to the tokenizer's eos alone
            model.save_pretrained(str(folder))
        else:
            save_adapter(model, folder)
        save_tokenizer(tokenizer, folder, system_policy=encoder.system_policy)
        sealed = contract if full else replace(contract, adapter_sha256=adapter_hash(folder))
        sealed.write(folder)

    target = run.model if full else run.adapter
    commit_folder(target, write, manifest=False)
    return target
