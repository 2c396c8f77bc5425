"""The bench: a recipe becomes a tokenizer, data sets and a model with its quantization and adapter. Every verb builds
here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gemma_ft import runtime
from gemma_ft.adapters.lora import add_adapter
from gemma_ft.added_tokens import begin_rows
from gemma_ft.build_data import build_data
from gemma_ft.data.files import DataFile, files_at
from gemma_ft.data.preview import Preview, look_at
from gemma_ft.data.preview_console import show
from gemma_ft.data.tokenizer import add_tokens, load_tokenizer
from gemma_ft.errors import UserError
from gemma_ft.hollow import hollow_base
from gemma_ft.load import load_base, located_rows, model_source
from gemma_ft.model.config import PRESETS
from gemma_ft.model.config_file import check_preset
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.recipe.load import LoadedRecipe
from gemma_ft.recipe.paths import locate
from gemma_ft.recipe.schema import Recipe
from gemma_ft.recipe.schema import Source as Rows
from gemma_ft.weights import Source, pinned

FRESH = "random"  # model.weights: start from fresh weights of the preset's shape


def weights_source(recipe: Recipe) -> Source:
    """Where the recipe's weights lie: `model.weights`, else the preset's own.

    Raises: UserError for something that is neither a folder nor a hub id.
    """
    name = recipe.model.weights or PRESETS[recipe.model.preset].weights
    return model_source(name, recipe.model.revision, key="model.weights: ")


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer of the recipe: `model.tokenizer`, else the one beside the weights, with `model.added_tokens`."""
    if recipe.model.tokenizer is not None:
        source = model_source(recipe.model.tokenizer, key="model.tokenizer: ")
    elif recipe.model.weights == FRESH:
        raise UserError("model.tokenizer: fresh weights come without a tokenizer; name a folder or hub id")
    else:
        source = weights_source(recipe)
    tokenizer = load_tokenizer(source.name, revision=source.revision)
    add_tokens(tokenizer, recipe.model.added_tokens or ())
    return tokenizer


def sources_of(recipe: Recipe) -> list[Rows]:
    """All rows that a recipe trains on and holds out."""
    return [*recipe.data.train, *(recipe.data.eval or ())]


def check_apart(recipe: Recipe, place: Path, *, named: str, cure: str) -> None:
    """Raises: UserError, from `named` to `cure`, when what is written to `place` would be read as rows: it lies in a
    folder that is a source.
    """
    for source in sources_of(recipe):
        folder = Path(located_rows(source.path))
        if os.path.isdir(folder) and place.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{named}: lies in {source.path}, whose files are all read as rows; {cure}")


def _files_of(source: Rows) -> list[DataFile]:
    """The files of this machine that a source stands for; none where it is to be refused when it is read."""
    try:
        return [file for file in files_at(located_rows(source.path), source.split) or () if not file.remote]
    except UserError:
        return []


def inputs_of(recipe: Recipe) -> list[str]:
    """The files and folders of this machine that a recipe reads."""
    rows = [file.name for source in sources_of(recipe) for file in _files_of(source)]
    names = [*rows, recipe.eval.canary, recipe.model.weights, recipe.model.tokenizer]
    return [str(found) for name in names if name is not None and (found := locate(name)) is not None]


def preview_recipe(loaded: LoadedRecipe, *, rows: int, row_ids: Sequence[str] = ()) -> Preview:
    """Print what a recipe would train on, as coloured tokens with counts: the first `rows` examples, or those that hold
    some rows. Returns it.

    Raises: DataError, also for a row that is not there.
    """
    for note in loaded.notes:
        print(f"note: {note}")
    data = build_data(loaded.recipe, build_tokenizer(loaded.recipe))
    found = look_at(
        data.train,
        data.encoder,
        format=data.train_format,
        rows=rows,
        row_ids=row_ids,
        held_out={item.where for item in data.held_out_items},
        global_batch_size=loaded.recipe.train.global_batch_size,
        streamed=data.streamed is not None,
    )
    show(found)
    return found


# Model


def build_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, hollow: bool = False
) -> tuple[Any, Source | None]:
    """The recipe's model, on its device, ready to train (adapter on, or every weight trainable), and where it came from
    (None for fresh weights).

    Frozen weights have the recipe's precision, or are quantized; what is trained is float32. `hollow`: the base without
    its values (gemma_ft.hollow), for ranks that will each hold a slice.
    """
    torch.manual_seed(recipe.seed)  # adapters and fresh weights are drawn here
    precision = runtime.dtype_by_name(recipe.train.precision)
    dtype = torch.float32 if recipe.strategy == "full" else precision
    attention = None if recipe.model.attention == "auto" else recipe.model.attention
    source = None
    if recipe.model.weights == FRESH:
        if recipe.strategy != "full":
            raise UserError("model.weights: fresh weights can only be trained in full; set strategy: full")
        config = PRESETS[recipe.model.preset].config(vocab_size=len(tokenizer), dtype=dtype)
        config._attn_implementation = attention
        model = GemmaForCausalLM(config).to(runtime.default_device())
    else:
        source = pinned(weights_source(recipe))
        kind = recipe.quantize.kind if recipe.quantize else None
        double_quant = recipe.quantize.double_quant if recipe.quantize else True
        base_of = hollow_base if hollow else load_base
        model = base_of(source, dtype=dtype, quantize=kind, double_quant=double_quant, attention=attention)
        check_preset(model.config.to_dict(), recipe.model.preset, source.name)
    names = recipe.model.added_tokens or []
    first = len(tokenizer) - len(names)
    if names and source is not None:
        if model.config.vocab_size != first:
            raise UserError(
                f"model.added_tokens: {source.name} has {model.config.vocab_size} rows for a tokenizer of {first} "
                "tokens; tokens can be added where each row has its token"
            )
        begin_rows(model, tokenizer, source)
    elif model.config.vocab_size < len(tokenizer):
        raise UserError(
            f"model.tokenizer: has {len(tokenizer)} tokens, the model {model.config.vocab_size}; use the model's own"
        )
    if recipe.strategy == "full" or recipe.adapter is None:
        return model, source
    assert source is not None, "fresh weights are trained in full"
    if hollow and recipe.adapter.dora:
        raise UserError(
            "adapter.dora: magnitudes are made of whole weights, which no rank has under FSDP; use --launch ddp"
        )
    return add_adapter(
        model,
        **recipe.adapter.model_dump(),
        base=source.name,
        revision=source.revision,
    ), source
