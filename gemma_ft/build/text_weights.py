"""The text model's tensors in a model folder, under the names that they have here, whatever its files call them; what
else lies in the folder is told, and left alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from gemma_ft.build.weights import EMBEDDING, HEAD, WeightFiles
from gemma_ft.errors import UserError
from gemma_ft.model.config_file import composite_in, family_in, is_reward_model
from gemma_ft.model.loading import refuse_unfitting, refuse_untied
from gemma_ft.model.reward import HEAD_WEIGHT
from gemma_ft.system.units import byte_size

_BUFFER = "rotary_emb.inv_freq"  # in some older folders
_ROWS = 1024  # of two tables that are compared


def has_other_names(folder: Path) -> bool:
    """Whether files of the folder's family may call a text model's tensors otherwise than we do."""
    family = family_in(folder)
    return family is not None and family.composite is not None


def model_weights(folder: Path) -> WeightFiles:
    """The weights of the text model in a folder. Of a family whose folders may hold several models, each tensor has our
    name; those of the others are its `left`, and shards that hold nothing else are not opened: they need not be there.

    Raises: UserError, as WeightFiles.open.
    """
    family = family_in(folder)
    composite = family.composite if family is not None else None
    return WeightFiles.open(folder, rename=composite.native if composite is not None else None)


def others_told(files: WeightFiles) -> str | None:
    """What lies beside the text model in a folder and its size, in a line; None where nothing does."""
    if not files.left:
        return None
    parts = ", ".join(dict.fromkeys(name.removeprefix("model.").partition(".")[0] for name in sorted(files.left)))
    unopened = {one for one in files.left.values() if isinstance(one, Path)}
    if not all(file.is_file() for file in unopened):
        return f"{parts}: not all of it is in the folder, and none of it is needed"
    known = sum(one.bytes for one in files.left.values() if not isinstance(one, Path))
    size = byte_size(known + sum(file.stat().st_size for file in unopened), None, ".1f")
    return f"{parts}: {size} stay in the folder, not loaded"


def others_fingerprint(folder: Path) -> str | None:
    """What tells the other models in a folder from others of their kind, as WeightFiles.fingerprint; None where there
    are none, or they are not all there.
    """
    left = model_weights(folder).left
    if not left or composite_in(folder) is None:
        return None
    try:
        whole = WeightFiles.open(folder)
        return WeightFiles(folder, {name: whole.info(name) for name in left}).fingerprint()
    except (UserError, OSError):
        return None


def check_fits(files: WeightFiles, model: Any, name: str) -> None:
    """Raises: UserError, in the words of the loader and before any tensor is read, where the files of `name` do not
    hold just the weights of `model`; for a head that is not the embedding, after it was read a block at a time. The
    head of a reward model may be missing from those of a language model.
    """
    wanted = {key: tuple(weight.shape) for key, weight in model.state_dict().items() if key != HEAD}
    if HEAD_WEIGHT not in files.names and not is_reward_model(files.folder):
        wanted.pop(HEAD_WEIGHT, None)
    found = {key: files.info(key).shape for key in files.names if key != HEAD and _BUFFER not in key}
    sizes = [(key, torch.Size(found[key]), torch.Size(wanted[key])) for key in sorted(found.keys() & wanted.keys())]
    info = {
        "missing_keys": wanted.keys() - found.keys(),
        "unexpected_keys": found.keys() - wanted.keys(),
        "mismatched_keys": [one for one in sizes if one[1] != one[2]],
    }
    refuse_unfitting(name, info)
    if HEAD in files.names and not _equal(files, HEAD, EMBEDDING):
        refuse_untied(name)


@contextlib.contextmanager
def unread(files: WeightFiles) -> Iterator[dict[str, Any]]:
    """The tensors of `files` by name, each read when it is indexed; transformers' loader takes them so. The head, which
    is the embedding, is not among them.
    """
    with contextlib.ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(str(files.folder / file), "pt")) for file in files.shards}
        yield {
            name: opened[files.info(name).file.name].get_slice(files.info(name).name)
            for name in files.names
            if name != HEAD
        }


def _equal(files: WeightFiles, one: str, other: str) -> bool:
    """Whether two tensors hold the same numbers; a few rows of each are in memory at a time."""
    if files.info(one).shape != files.info(other).shape:
        return False
    with unread(files) as slices, safe_open(str(files.info(one).file), "pt") as file:
        first, second = file.get_slice(files.info(one).name), slices[other]
        rows = files.info(one).shape[0]
        return all(
            torch.equal(*(side[start : start + _ROWS].double() for side in (first, second)))
            for start in range(0, rows, _ROWS)
        )
