"""What transformers' loader found in a folder, held against what the model needs: nothing is left at random."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from gemma_ft.errors import UserError
from gemma_ft.families.family import Composite
from gemma_ft.families.records import COMPOSITES


def text_names(composite: Composite) -> dict[str, str]:
    """From the names of a text model's tensors in a folder of several models to ours, as transformers' key_mapping."""
    prefixes = "|".join(re.escape(prefix) for prefix in sorted(composite.file_prefixes, key=len, reverse=True))
    return {rf"^(?:{prefixes})": "model."}


def other_parts() -> Iterator[str]:
    """Regular expressions of the names of tensors that belong to other models of a folder: they are never read."""
    for family in COMPOSITES.values():
        assert family.composite is not None
        yield from (f"^{re.escape(part)}" for part in family.composite.parts)


def refuse_unfitting(name: Any, info: Mapping[str, Any]) -> None:
    """Raises: UserError when by transformers' loading info a weight of the model in `name` is missing, unexpected or of
    another shape.
    """
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(_described, info.get(kind) or ()))
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(f"{name}: {kind.replace('_', ' ')} in the weights: {shown}")


def _described(key: str | tuple[str, torch.Size, torch.Size]) -> str:
    """A weight's name; of one that does not fit also its shape in the file, and the shape that config.json asks for."""
    if isinstance(key, str):
        return key
    name, found, expected = key
    return f"{name} is {list(found)}, config.json asks for {list(expected)}"
