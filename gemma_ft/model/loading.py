"""What transformers' loader found in a folder, held against what the model needs: nothing is left at random."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NoReturn

import torch

from gemma_ft.errors import UserError
from gemma_ft.families.records import COMPOSITES, FAMILIES
from gemma_ft.model.linear import keep_trainable

FLOAT16_OVERFLOWS = "overflows in Gemma, whose activations pass 65504"
HUB_KEYS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def other_parts() -> Iterator[str]:
    """Regular expressions of the names of tensors that belong to other models of a folder: they are never read."""
    for composite in COMPOSITES.values():
        yield from (f"^{re.escape(part)}" for part in composite.parts)


def load_whole(
    loader: Callable[..., Any], name: Any, *args: Any, config: Any, fresh: Collection[str] = (), **options: Any
) -> tuple[Any, dict[str, Any]]:
    """A model from a folder or hub id by a class's own `loader`, every weight of it from there but those that are
    `fresh`, ready to be asked or trained; and what the loader says of the weights.

    Raises: UserError, as `refuse_unfitting`; and for weights stored in float16, where that is not asked for by name.
    """
    options["use_safetensors"] = True  # a pickle is never opened
    options["ignore_mismatched_sizes"] = True  # they are refused below, by name; transformers' own error names none
    composite = FAMILIES[config.model_type].composite
    if composite is not None:
        options["key_mapping"] = composite.key_mapping
    model, info = loader(name, *args, config=config, output_loading_info=True, **options)
    refuse_unfitting(name, info, fresh)
    model._weight_conversions = None  # else transformers saves under names that are neither the folder's nor ours
    keep_trainable(model)
    asked = options.get("dtype", options.get("torch_dtype"))
    if model.dtype == torch.float16 and asked not in (torch.float16, "float16"):
        raise UserError(f"{name}: stored in float16, which {FLOAT16_OVERFLOWS}; pass dtype=torch.bfloat16")
    return model, info


def refuse_unfitting(name: Any, info: Mapping[str, Any], fresh: Collection[str] = ()) -> None:
    """Raises: UserError when by transformers' loading info a weight of the model in `name` is missing, unexpected or of
    another shape; those that are `fresh` may be missing.
    """
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        found = [one for one in info.get(kind) or () if one not in fresh]
        names = sorted(map(_described, found))
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
