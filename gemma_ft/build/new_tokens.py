"""The rows of added tokens put on a base: as an adapter holds them, or as they begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gemma_ft.adapters.kinds import ADAPTER_CONFIG
from gemma_ft.adapters.trainable_tokens import INITIAL, TRAINED, added_by
from gemma_ft.build.located import Source, folder_of
from gemma_ft.build.place import Place
from gemma_ft.build.text_weights import model_weights
from gemma_ft.build.weights import EMBEDDING, WeightFiles
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.tokenizer import ContentEncoder, pieces_of
from gemma_ft.errors import UserError
from gemma_ft.model.added_rows import AddedRows


def tokens_beyond(tokenizer: Any, rows: int) -> list[str]:
    """The tokens without a row in an embedding of so many rows that a text can become; [] where there are none, or only
    control tokens: Gemma 3's tokenizer has one for images, and its text-only models no row for it.
    """
    beyond = range(rows, len(tokenizer))
    control = ContentEncoder(tokenizer).control_ids if beyond else frozenset()
    return [tokenizer.convert_ids_to_tokens(one) for one in beyond if one not in control]


def embedding_rows(place: Place) -> int:
    """How many tokens the model of a place has rows for: those of its base, and what its adapter adds.

    Raises: UserError, as `added_by`.
    """
    known: int = place.of_base.config.vocab_size
    adapter = place.of_adapter
    added = added_by(adapter.config, adapter.folder / ADAPTER_CONFIG, known) if adapter is not None else None
    return known + (0 if added is None else added.count)


def check_rows(encoder: ChatEncoder, rows: int, where: object) -> None:
    """Raises: UserError where an encoder can give an id for which an embedding of so many rows has none."""
    tokenizer = encoder.tokenizer
    beyond = set(range(rows, len(tokenizer)))
    beyond -= encoder.content.control_ids - set(encoder.written_ids)
    if beyond:
        id = min(beyond)
        raise UserError(
            f"{where}: its tokenizer gives {tokenizer.convert_ids_to_tokens(id)!r} the id {id}, but the embedding ends "
            f"before {rows}; the tokenizer is another model's, or its tokens were added and their rows never trained"
        )


def begin_rows(model: Any, tokenizer: Any, source: Source) -> None:
    """Give a model of `source` rows for the tokens that its tokenizer has beyond its embedding, if a text can become
    any: each begins as the mean of the rows of what its name was before.
    """
    first = model.config.vocab_size
    if not tokens_beyond(tokenizer, first):
        return
    names = tokenizer.convert_ids_to_tokens(list(range(first, len(tokenizer))))
    table = model_weights(folder_of(source, downloaded=True)).tensor(EMBEDDING)
    rows = [table[ids].to(torch.float32).mean(dim=0) for ids in pieces_of(tokenizer, names)]
    model.model.added_rows = AddedRows(first, torch.stack(rows)).to(model.device)


def take_rows(model: Any, files: WeightFiles, config: Any, folder: Path) -> None:
    """Give `model` the rows of the tokens that an adapter adds, and take them from what PEFT is to do by `config`;
    rows that the base has itself are PEFT's to replace.

    Raises: UserError where they do not go with this base.
    """
    said = added_by(config, folder / ADAPTER_CONFIG, model.config.vocab_size)
    if said is None:
        return
    rows = [files.tensor(name) for name in (TRAINED, INITIAL) if name in files.names]
    shape = (said.count, model.config.hidden_size)
    if TRAINED not in files.names or any(tuple(one.shape) != shape for one in rows):
        raise UserError(
            f"{folder}: adds {said.count} tokens from id {said.first}, but the rows of width {shape[1]} are not in it; "
            "the adapter is not whole, or another base's"
        )
    added = AddedRows(said.first, rows[-1])
    with torch.no_grad():
        added.weight.copy_(rows[0])
    model.model.added_rows = added.requires_grad_(False).to(model.device)
    config.trainable_token_indices = None
