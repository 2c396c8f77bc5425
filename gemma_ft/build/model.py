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
from gemma_ft.recipe.schema import Recipe
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
    precision = hardware.dtype_by_name(recipe.train.precision)
    dtype = torch.float32 if recipe.strategy == "full" else precision
    attention = None if recipe.model.attention == "auto" else recipe.model.attention
    source, reward = None, recipe.objective.kind == "reward"
    if recipe.model.weights == FRESH:
        if recipe.strategy != "full":
            raise UserError("model.weights: fresh weights can only be trained in full; set strategy: full")
        config = PRESETS[recipe.model.preset].config(vocab_size=len(tokenizer), dtype=dtype)
        config._attn_implementation = attention
        model = (GemmaForSequenceClassification if reward else GemmaForCausalLM)(config).to(hardware.default_device())
    else:
        source = pinned(weights_source(recipe))
        kind = recipe.quantize.kind if recipe.quantize else None
        double_quant = recipe.quantize.double_quant if recipe.quantize else True
        base_of = empty_base if empty else load_base
        options: dict[str, Any] = {"quantize": kind, "double_quant": double_quant, "attention": attention}
        model = base_of(source, dtype=dtype, reward=reward, **options)
        check_preset(model.config.to_dict(), recipe.model.preset, source.name)
    if reward:
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
    if empty and recipe.adapter.dora:
        raise UserError(
            "adapter.dora: magnitudes are made of whole weights, which no rank has under FSDP; use --launch ddp"
        )
    if recipe.adapter.start is not None and reward:
        raise UserError(
            f"adapter.start: {recipe.adapter.start}: a reward model begins with a whole model; merge the adapter "
            "(gemma-ft merge), and set model.weights to the result"
        )
    if recipe.adapter.start is not None:
        if added:
            raise UserError("model.added_tokens: training goes on from adapter.start, which has none; take them out")
        compared = reference_kind(recipe.objective, recipe.strategy, recipe.adapter.start) == "start"
        return put_start(model, recipe.adapter, source, compared=compared), source
    return add_adapter(
        model,
        **recipe.adapter.model_dump(exclude={"start"}),
        base=source.name,
        revision=source.revision,
        reward=reward,
    ), source
