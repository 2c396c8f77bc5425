"""The rows of added tokens in a PEFT adapter: PEFT's names and config for them (`trainable_token_indices`), so that
stock PEFT opens the folder once the base's embedding has been resized to the tokenizer.

PEFT's own layer for them is not used: it copies the whole embedding at each pass, twice, and gives the head a gradient
of that size (docs/data.md says what that costs).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_ft.errors import UserError

LAYER, HEAD = "embed_tokens", "lm_head"  # one tensor in every Gemma
_PLACE = f"base_model.model.model.{LAYER}.token_adapter."
TRAINED = f"{_PLACE}trainable_tokens_delta"  # whole rows, whatever the name says
INITIAL = f"{_PLACE}trainable_tokens_original"  # PEFT has it in memory and ignores it in a file


def native_of(model: Any) -> Any:
    """The model that PEFT's wrapper is around; a model without one itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def rows_of(model: Any) -> Any:
    """The added rows of a model, within PEFT's wrapper or without; None where it has none."""
    return getattr(native_of(model).model, "added_rows", None)


def rows_in(model: Any) -> int:
    """How many tokens a model has rows for, its added ones among them."""
    added = rows_of(model)
    return len(native_of(model).get_input_embeddings().weight) + (0 if added is None else len(added.weight))


def indices(first: int, count: int) -> dict[str, list[int]]:
    """What `trainable_token_indices` says of `count` added tokens."""
    return {LAYER: list(range(first, first + count))}


@dataclass(frozen=True)
class Added:
    """Tokens whose rows an adapter trains: so many, whose ids begin with `first`."""

    first: int
    count: int


def weight_name(model: Any, rows: Any) -> str:
    """The name that the trained rows have among the parameters of a model, within PEFT's wrapper or without."""
    return next(name for name, one in model.named_parameters() if one is rows.weight)


def rows_trained(config: Any, path: Path) -> dict[str, list[int]]:
    """Layer -> ids of the tokens whose rows an adapter trains in it, by its PEFT config; empty where there are none.

    Raises: UserError for what are no ids.
    """
    found = getattr(config, "trainable_token_indices", None)
    key = "trainable_token_indices"
    if hasattr(config, "token_indices"):  # PEFT's type that has nothing else
        key, layers = "token_indices", config.target_modules or LAYER
        found = dict.fromkeys([layers] if isinstance(layers, str) else layers, config.token_indices)
    rows = {LAYER: found} if isinstance(found, list) else found or {}
    good = isinstance(rows, dict) and all(isinstance(ids, list) and ids for ids in rows.values())
    if not good or any(type(one) is not int or not 0 <= one < 2**31 for ids in rows.values() for one in ids):
        raise UserError(f"{path}: {key}: expected ids of tokens, got {found!r}; fetch it again")
    return rows


def added_by(config: Any, path: Path, known: int) -> Added | None:
    """The tokens that an adapter adds to the `known` ones of its base; None where all rows it trains are the base's.

    Raises: UserError where those beyond the base's are not one run behind them, for the embedding, and nothing else.
    """
    rows = rows_trained(config, path)
    highest = max((one for ids in rows.values() for one in ids), default=-1)
    if highest < known:
        return None
    ids = next(iter(rows.values()))
    own = hasattr(config, "trainable_token_indices") and all(ids == other for other in rows.values())
    behind = ids == list(range(known, known + len(ids)))
    if not own or not behind or not any(one.rpartition(".")[2] == LAYER for one in rows):
        raise UserError(
            f"{path}: trains the rows of tokens up to id {highest}, its base has {known}; rows that are added must be "
            f"all that is trained of {LAYER}, and follow each other from id {known}: give a base whose embedding was "
            "resized to them, or the base that it was trained on"
        )
    return Added(known, len(ids))


def add_to_folder(folder: Path, trained: Tensor, initial: Tensor) -> None:
    """Put rows into the weights of an adapter folder that PEFT has written."""
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    path = folder / SAFETENSORS_WEIGHTS_NAME
    rows = {TRAINED: trained, INITIAL: initial}
    whole = load_file(path) | {name: one.detach().cpu().contiguous() for name, one in rows.items()}
    save_file(whole, path, metadata={"format": "pt"})
