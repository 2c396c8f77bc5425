"""What transformers' loader found in a folder, held against what the model needs: nothing is left at random."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch

from gemma_ft.errors import UserError
from gemma_ft.families.records import COMPOSITES


def other_parts() -> Iterator[str]:
    """Regular expressions of the names of tensors that belong to other models of a folder: they are never read."""
    for composite in COMPOSITES.values():
        yield from (f"^{re.escape(part)}" for part in composite.parts)


def refuse_unfitting(name: Any, info: Mapping[str, Any]) -> None:
    """Raises: UserError when by transformers' loading info a weight of the model in `name` is missing, unexpected or of
    another shape.
    """
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(_described, info.get(kind) or ()))
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(f"{name}: {kind.replace('_', ' ')} in the weights: {shown}")


def refuse_untied(name: Any) -> NoReturn:
    """Raises: UserError for the model in `name`, whose head is another tensor than its embedding."""
    raise UserError(
        f"{name}: lm_head.weight is not the embedding; every Gemma's head is tied to it: "
        "drop lm_head.weight from the weights and tie_word_embeddings from config.json"
    )


def _described(key: str | tuple[str, torch.Size, torch.Size]) -> str:
    """A weight's name; of one that does not fit also its shape in the file, and the shape that config.json asks for."""
    if isinstance(key, str):
        return key
    name, found, expected = key
    return f"{name} is {list(found)}, config.json asks for {list(expected)}"
