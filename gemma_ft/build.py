"""The bench: a recipe becomes a tokenizer, data sets and a model with its quantization and adapter. Every verb builds
here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gemma_ft import runtime
from gemma_ft.adapters.lora import add_adapter
from gemma_ft.data.bad_rows import BadRows
from gemma_ft.data.cache import Cache, Reading, items_at
from gemma_ft.data.chat import ChatEncoder
from gemma_ft.data.chunks import Chunk
from gemma_ft.data.dataset import Prepared, arrange, chosen_by_hash, prepare, split_by_hash
from gemma_ft.data.documents import Documents
from gemma_ft.data.formats import check_format, detect_format, parse_rows
from gemma_ft.data.items import Conversation, Item, content_hash
from gemma_ft.data.preview import preview
from gemma_ft.data.sources import Row, read_chunks, read_rows, rows_of
from gemma_ft.data.tokenizer import load_tokenizer
from gemma_ft.errors import DataError, UserError
from gemma_ft.hollow import hollow_base
from gemma_ft.load import load_base, located, model_source
from gemma_ft.model.config import PRESETS
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.recipe.load import LoadedRecipe
from gemma_ft.recipe.paths import locate
from gemma_ft.recipe.schema import Data, Recipe
from gemma_ft.weights import Source, pinned

FRESH = "random"  # model.weights: start from fresh weights of the preset's shape


def weights_source(recipe: Recipe) -> Source:
    """Where the recipe's weights lie: `model.weights`, else the preset's own.

    Raises: UserError for something that is neither a folder nor a hub id.
    """
    name = recipe.model.weights or PRESETS[recipe.model.preset].weights
    return model_source(name, recipe.model.revision, key="model.weights: ")


# Tokenizer and data


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer of the recipe: `model.tokenizer`, else the one beside the weights."""
    if recipe.model.tokenizer is not None:
        source = model_source(recipe.model.tokenizer, key="model.tokenizer: ")
    elif recipe.model.weights == FRESH:
        raise UserError("model.tokenizer: fresh weights come without a tokenizer; name a folder or hub id")
    else:
        source = weights_source(recipe)
    return load_tokenizer(source.name, revision=source.revision)


@dataclass(frozen=True)
class BuiltData:
    """What a run reads: examples for training and for the held-out loss, and the held-out conversations as they
    were.
    """

    encoder: ChatEncoder
    train: Prepared
    held_out: Prepared | None
    held_out_items: Sequence[Item]
    train_source: str
    train_format: str  # the format of the training rows, and why
    eval_source: str | None
    overlap: int  # held-out rows that are training rows too


def build_data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, progress: Callable[[int], None] = lambda documents: None
) -> BuiltData:
    """Read, check, encode and pack the recipe's rows; what was encoded before is taken from the cache. `progress` hears
    how many training documents have come.
    """
    data = recipe.data
    encoder = ChatEncoder(tokenizer, data.system)
    rows = rows_of_first_chunk(data, data.train)
    form, why = detect_format(rows, _columns(data)) if data.format == "auto" else (data.format, "named in the recipe")
    check_format(form, _columns(data))
    reading = Reading(form, _columns(data), encoder)
    documents = Cache(runtime.cache_folder(), runtime.processors()).documents(
        read_source(data, data.train), reading, progress
    )
    fitted = partial(arrange, encoder=encoder, max_seq_len=data.max_seq_len, packing=data.packing)
    held_out, chosen, scored = Held(None, []), None, None
    if data.eval is not None:
        held_out = Held(data.eval, _held_out_items(data, rows))
    elif data.eval_fraction:
        documents, chosen, held_out = _split(recipe, documents, reading)
    train = fitted(documents, chosen=chosen)
    try:
        if held_out.items:
            limit = recipe.eval.max_rows
            scored = prepare(held_out.items[:limit], encoder, max_seq_len=data.max_seq_len, packing=data.packing)
    except DataError as error:
        raise DataError(f"held-out rows, {held_out.source}: {error}") from error
    contents = documents.contents()
    seen = set(contents if chosen is None else (contents[number] for number in chosen))
    return BuiltData(
        encoder=encoder,
        train=train,
        held_out=scored,
        held_out_items=held_out.items,
        overlap=sum(bytes.fromhex(content_hash(item)) in seen for item in held_out.items),
        train_source=data.train,
        train_format=f"{form}: {why}",
        eval_source=held_out.source,
    )


@dataclass(frozen=True)
class Held:
    """Held-out items, and where they came from."""

    source: str | None
    items: Sequence[Item]


def _split(recipe: Recipe, documents: Documents, reading: Reading) -> tuple[Documents, Any, Held]:
    """The documents of training rows, which of them are trained on, and the held-out items; by content hash."""
    data = recipe.data
    source = f"{data.eval_fraction:.1%} of {data.train}"
    if documents.items == 1 and not documents.column("chat").any():
        only = next(item for chunk in read_source(data, data.train) for _, item in reading.items(chunk, BadRows()))
        train, held_out = split_by_hash([only], data.eval_fraction, recipe.seed)
        return Documents.of(train, reading.encoder), None, Held(source, held_out)
    chosen, out = chosen_by_hash(documents, data.eval_fraction, recipe.seed)
    return documents, chosen, Held(source, items_at(read_source(data, data.train), reading, documents, out))


def rows_of_first_chunk(data: Data, source: str) -> list[Row]:
    """The first rows of a source that are whole. Raises: DataError when it holds none."""
    bad = BadRows()
    for chunk in read_source(data, source):
        rows = rows_of(chunk, bad)
        if rows:
            return rows
    bad.raise_if_any()
    raise DataError(f"{located(source)}: holds no rows")


def read_source(data: Data, source: str) -> Iterator[Chunk]:
    """The rows of one source, unparsed. Raises: DataError when it cannot be read."""
    return read_chunks(located(source), split=data.split, revision=data.revision)


def _columns(data: Data) -> dict[str, str]:
    """The recipe's column names as the data room takes them."""
    return {str(key): template for key, template in data.columns.items()}


def _held_out_items(data: Data, train_rows: list[Row]) -> Sequence[Item]:
    """The rows of data.eval as items. `data.format` and `data.columns` describe data.train: they hold for data.eval
    where its rows have the same fields, and otherwise (training rows were replaced on the command line, say) its format
    is detected.
    """
    assert data.eval is not None, "asked for only where it is set"
    rows = read_rows(located(data.eval), split=data.split, revision=data.revision)
    alike = rows[0].fields.keys() == train_rows[0].fields.keys()
    return parse_rows(rows, format=data.format, columns=_columns(data)) if alike else parse_rows(rows)


def conversations(items: Sequence[Item]) -> list[Conversation]:
    """The conversations among items: those that can be answered by generation."""
    return [item for item in items if isinstance(item, Conversation)]


def inputs_of(recipe: Recipe) -> list[str]:
    """The files and folders of this machine that a recipe reads."""
    names = [recipe.data.train, recipe.data.eval, recipe.eval.canary, recipe.model.weights, recipe.model.tokenizer]
    return [str(found) for name in names if name is not None and (found := locate(name)) is not None]


def preview_recipe(loaded: LoadedRecipe, *, rows: int) -> bool:
    """Print what a recipe would train on, as coloured tokens with counts; True when every check passed."""
    for note in loaded.notes:
        print(f"note: {note}")
    data = build_data(loaded.recipe, build_tokenizer(loaded.recipe))
    print(f"format: {data.train_format}")
    return preview(data.train, data.encoder, rows=rows)


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
        _check_preset(model.config, recipe.model.preset, source.name)
    if model.config.vocab_size < len(tokenizer):
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


def _check_preset(config: Any, preset: str, name: str) -> None:
    """Raises UserError when the weights are not of the preset's shape, and says which preset they are, if any."""

    def differences(key: str) -> list[str]:
        expected = PRESETS[key].config()
        fields = ["model_type", *PRESETS[key].fields]
        return [
            f"{field} {getattr(config, field, None)}, not {getattr(expected, field)}"
            for field in fields
            if getattr(config, field, None) != getattr(expected, field)
        ]

    wrong = differences(preset)
    if wrong:
        fitting = next((key for key in PRESETS if not differences(key)), None)
        cure = f"set model.preset: {fitting}" if fitting else "set model.preset to the size that it is"
        raise UserError(f"model.preset: {name} is not a {preset} ({wrong[0]}); {cure}")
