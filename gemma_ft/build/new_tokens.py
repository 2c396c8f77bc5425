"""The rows of added tokens put on a base: as an adapter holds them, or as they begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gemma_ft.adapters.trainable_tokens import INITIAL, TRAINED, added_by
from gemma_ft.build.located import Source, folder_of
from gemma_ft.build.weights import EMBEDDING, WeightFiles
from gemma_ft.data.encode.tokenizer import pieces_of
from gemma_ft.errors import UserError
from gemma_ft.model.added_rows import AddedRows


def begin_rows(model: Any, tokenizer: Any, source: Source) -> None:
    """Give a model of `source` rows for the tokens that its tokenizer has beyond its embedding, if any: each begins as
    the mean of the rows of what its name was before.
    """
    first = model.config.vocab_size
    names = tokenizer.convert_ids_to_tokens(list(range(first, len(tokenizer))))
    if not names:
        return
    table = WeightFiles.open(folder_of(source, downloaded=True)).tensor(EMBEDDING)
    rows = [table[ids].to(torch.float32).mean(dim=0) for ids in pieces_of(tokenizer, names)]
    model.model.added_rows = AddedRows(first, torch.stack(rows)).to(model.device)


def take_rows(model: Any, files: WeightFiles, config: Any, folder: Path) -> None:
    """Give `model` the rows of the tokens that an adapter adds, and take them from what PEFT is to do by `config`;
    rows that the base has itself are PEFT's to replace.

    Raises: UserError where they do not go with this base.
    """
    said = added_by(config, folder / "adapter_config.json", model.config.vocab_size)
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
