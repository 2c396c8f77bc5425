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

LAYER = "embed_tokens"
_PLACE = f"base_model.model.model.{LAYER}.token_adapter."
TRAINED = f"{_PLACE}trainable_tokens_delta"  # whole rows, whatever the name says
INITIAL = f"{_PLACE}trainable_tokens_original"  # PEFT has it in memory and ignores it in a file


def rows_of(model: Any) -> Any:
    """The added rows of a model, within PEFT's wrapper or without; None where it has none."""
    native = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(native.model, "added_rows", None)


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


def added_by(config: Any, path: Path) -> Added | None:
    """The tokens whose rows an adapter trains, by its PEFT config; None where there are none.

    Raises: UserError where their ids are not one run, for the embedding.
    """
    found = getattr(config, "trainable_token_indices", None)
    if not found:
        return None
    ids: Any = found.get(LAYER) if isinstance(found, dict) and len(found) == 1 else found
    numbers = isinstance(ids, list) and ids and all(type(one) is int and 0 <= one < 2**31 for one in ids)
    if not numbers or ids != list(range(ids[0], ids[0] + len(ids))):
        raise UserError(
            f"{path}: trainable_token_indices: expected ids of {LAYER}, one after the other; other rows are not "
            "supported"
        )
    return Added(ids[0], len(ids))


def add_to_folder(folder: Path, trained: Tensor, initial: Tensor) -> None:
    """Put rows into the weights of an adapter folder that PEFT has written."""
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    path = folder / SAFETENSORS_WEIGHTS_NAME
    rows = {TRAINED: trained, INITIAL: initial}
    whole = load_file(path) | {name: one.detach().cpu().contiguous() for name, one in rows.items()}
    save_file(whole, path, metadata={"format": "pt"})
