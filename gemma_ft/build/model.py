"""A recipe becomes a model with its quantization and adapter. Every verb builds here."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gemma_ft.adapters.lora import add_adapter
from gemma_ft.build.empty_weights import empty_base
from gemma_ft.build.inputs import FRESH, weights_source
from gemma_ft.build.located import Source, pinned
from gemma_ft.build.new_tokens import begin_rows, tokens_beyond
from gemma_ft.build.pretrained import load_base
from gemma_ft.build.start_adapter import put_start
from gemma_ft.errors import UserError
from gemma_ft.families.records import PRESETS
from gemma_ft.model.config_file import check_preset
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.model.reward import GemmaForSequenceClassification
from gemma_ft.recipe.objectives import reference_kind
from gemma_ft.recipe.schema import Adapter, Recipe
from gemma_ft.system import hardware


def build_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, empty: bool = False
) -> tuple[Any, Source | None]:
    """The recipe's model, on its device, ready to train (adapter on, or every weight trainable), and where it came from
    (None for fresh weights).

    Frozen weights have the recipe's precision, or are quantized; what is trained is float32. `empty`: the base without
    its values (gemma_ft.build.empty_weights), for ranks that will each hold a slice. Of the objective `reward` it is a
    reward model, whose head is float32 and trained, and zero where it begins with a language model.
    """
    torch.manual_seed(recipe.seed)  # adapters and fresh weights are drawn here
    model, source = _whole_model(recipe, len(tokenizer), empty=empty)
    if recipe.objective.kind == "reward":
        model.config.pad_token_id = tokenizer.pad_token_id  # transformers finds the last token by it
    rows, added = model.config.vocab_size, recipe.model.added_tokens or []
    first = len(tokenizer) - len(added)
    if added and source is not None and rows > first:
        raise UserError(
            f"model.added_tokens: {source.name} has {rows} rows for a tokenizer of {first} tokens; tokens can be added "
            "where each row has its token"
        )
    if set(tokens_beyond(tokenizer, rows)) - set(added):
        raise UserError(f"model.tokenizer: has {first} tokens, the model {rows}; use the model's own")
    if added and source is not None:
        begin_rows(model, tokenizer, source)
    if recipe.strategy == "full" or recipe.adapter is None:
        return model, source
    assert source is not None, "fresh weights are trained in full"
    return _with_adapter(model, recipe, recipe.adapter, source, empty=empty), source


def _whole_model(recipe: Recipe, tokens: int, *, empty: bool) -> tuple[Any, Source | None]:
    """The model without an adapter: fresh weights with so many `tokens`, or a base that is loaded."""
    precision = hardware.dtype_by_name(recipe.train.precision)
    dtype = torch.float32 if recipe.strategy == "full" else precision
    attention = None if recipe.model.attention == "auto" else recipe.model.attention
    reward = recipe.objective.kind == "reward"
    if recipe.model.weights == FRESH:
        if recipe.strategy != "full":
            raise UserError("model.weights: fresh weights can only be trained in full; set strategy: full")
        config = PRESETS[recipe.model.preset].config(vocab_size=tokens, dtype=dtype)
        config._attn_implementation = attention
        made = (GemmaForSequenceClassification if reward else GemmaForCausalLM)(config)
        return made.to(hardware.default_device()), None
    source = pinned(weights_source(recipe))
    kind = recipe.quantize.kind if recipe.quantize else None
    double_quant = recipe.quantize.double_quant if recipe.quantize else True
    base_of = empty_base if empty else load_base
    options: dict[str, Any] = {"quantize": kind, "double_quant": double_quant, "attention": attention}
    model = base_of(source, dtype=dtype, reward=reward, **options)
    check_preset(model.config.to_dict(), recipe.model.preset, source.name)
    return model, source


def _with_adapter(model: Any, recipe: Recipe, adapter: Adapter, source: Source, *, empty: bool) -> Any:
    """The base with a fresh adapter on it, or with the one that training goes on from."""
    reward = recipe.objective.kind == "reward"
    if empty and adapter.dora:
        raise UserError(
            "adapter.dora: magnitudes are made of whole weights, which no rank has under FSDP; use --launch ddp"
        )
    if adapter.start is None:
        settings = adapter.model_dump(exclude={"start"})
        return add_adapter(model, **settings, base=source.name, revision=source.revision, reward=reward)
    if reward:
        raise UserError(
            f"adapter.start: {adapter.start}: a reward model begins with a whole model; merge the adapter "
            "(gemma-ft merge), and set model.weights to the result"
        )
    if recipe.model.added_tokens:
        raise UserError("model.added_tokens: training goes on from adapter.start, which has none; take them out")
    compared = reference_kind(recipe.objective, recipe.strategy, adapter.start) == "start"
    return put_start(model, adapter, source, compared=compared)
