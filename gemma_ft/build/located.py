"""Where models and rows lie: what a user wrote becomes a folder of this machine, or a hub id and its commit.

Nothing here needs torch or transformers: rows are looked at without them.
"""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from gemma_ft.adapters.kinds import ADAPTER_CONFIG, ADAPTER_WEIGHTS, REWARD_TASK
from gemma_ft.data.encode.tokenizer import HUB_ID
from gemma_ft.errors import DataError, UserError
from gemma_ft.model.config_file import is_reward_model
from gemma_ft.recipe.run_files import RunFiles
from gemma_ft.system.hub import snapshot
from gemma_ft.system.paths import expanded
from gemma_ft.system.shipped import locate, shipped_root

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
NO_WEIGHTS = "a file, not a folder"  # what `taken_for_folder` says of a file that holds none
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*", "*.jinja"]


@dataclass(frozen=True)
class Source:
    """Where a model comes from: an absolute folder, or a hub id with the revision asked for."""

    name: str
    revision: str | None


def located(name: str | Path) -> str:
    """A path as it stands on this machine (home folder for `~`, current directory, then the files that ship), or `name`
    as it is: a hub id.
    """
    found = locate(name)
    return str(found) if found is not None else expanded(name)


def located_rows(name: str) -> str:
    """As `located`, for rows: of what ships with the project a file, and never a folder, which was not meant.

    Raises: DataError when there is such a folder and nothing of that name here.
    """
    found = locate(name)
    here = found is not None and (found == Path(expanded(name)) or not found.is_relative_to(shipped_root()))
    if found is not None and found.is_dir() and not here:
        raise DataError(f"{name}: no such folder here; paths count from the current directory")
    return str(found) if found is not None else expanded(name)


def model_source(name: str, revision: str | None = None, *, key: str = "", weights: bool = True) -> Source:
    """An absolute folder or a hub id out of what a user wrote; `key` begins the message of the error.

    Raises: UserError for what is neither; and, where its weights are wanted, for the folder of an adapter or a run.
    """
    found = locate(name)
    if found is not None and found.is_dir():
        if weights:
            check_is_model(found, name, key)
        return Source(str(found.resolve()), None)
    if found is not None:
        refuse_file(found, f"{key}{name}")
    if not HUB_ID.fullmatch(name):
        raise UserError(f"{key}{name}: no such folder; name a folder with a model, or a hub id (owner/name)")
    return Source(name, revision)


def check_is_model(folder: Path, name: str, key: str = "") -> None:
    """Raises: UserError, begun by `key`, for the folder of an adapter or a run where a model is wanted."""
    if (folder / "config.json").is_file():
        return
    adapter = adapter_in(folder)
    if adapter is not None:
        what = "an adapter" if adapter == folder else "a run with an adapter"
        raise UserError(
            f"{key}{name}: {what}, no model of its own; merge it first (gemma-ft merge {shlex.quote(name)} --out DIR) "
            "and give DIR"
        )
    model = model_in(folder)
    if model is not None:
        raise UserError(f"{key}{name}: a run; give the model in it, {os.path.join(name, model.name)}")


def adapter_in(folder: Path) -> Path | None:
    """The adapter folder that a run or an adapter folder stands for, or None."""
    return next((one for one in (RunFiles(folder).adapter, folder) if (one / ADAPTER_CONFIG).is_file()), None)


def model_in(run: Path) -> Path | None:
    """The folder of the fully tuned model that a run stands for, or None."""
    folder = RunFiles(run).model
    return folder if (folder / "config.json").is_file() else None


def is_reward(folder: Path) -> bool:
    """Whether a run, adapter or model folder is a reward model's, as far as its small files tell."""
    adapter = adapter_in(folder)
    if adapter is None:
        return is_reward_model(model_in(folder) or folder)
    try:
        said = json.loads((adapter / ADAPTER_CONFIG).read_bytes())
        return isinstance(said, dict) and said.get("task_type") == REWARD_TASK
    except (OSError, ValueError, RecursionError):  # told where it is opened
        return False


def refuse_reward(name: str | Path) -> NoReturn:
    """Raises: UserError that says what a reward model does where text is wanted of it."""
    raise UserError(
        f"{name}: a reward model, which gives an answer a number and writes none; "
        f"gemma-ft score {shlex.quote(str(name))} --input ROWS --output FILE"
    )


def taken_for_folder(file: Path) -> tuple[str, str]:
    """What a file is that was given where a folder with a model is wanted, and what to give instead."""
    a_model = "name a folder with a model, or a hub id (owner/name)"
    magic = b""
    if file.is_file() and os.access(file, os.R_OK):
        with file.open("rb") as opened:
            magic = opened.read(4)
    if magic == b"GGUF" or file.suffix.lower() == ".gguf":
        return "a GGUF file", f"{a_model}; gemma-ft import FILE --out DIR makes one of it"
    if file.name.endswith((".safetensors", ".safetensors.index.json")):
        if file.name.startswith(ADAPTER_WEIGHTS.partition(".")[0]):
            return "the weights of an adapter", f"name their folder, {file.parent}"
        if (file.parent / "config.json").is_file():
            return "the weights of a model", f"name their folder, {file.parent}"
        return "weights alone, with no config.json beside them", a_model
    if file.suffix.lower() in PICKLES:
        return "a pickle, which can run code when it is opened and is refused", (
            f"convert it to safetensors where it was made; {a_model}"
        )
    return NO_WEIGHTS, a_model


def refuse_file(file: Path, name: str | None = None) -> NoReturn:
    """Raises: UserError that says what a file is which the user named (`name`) where a model's folder is wanted."""
    raise UserError(f"{name or file}: {'; '.join(taken_for_folder(file))}")


def refuse_weights(file: Path, name: str, instead: str | None = None) -> None:
    """Raises: UserError for a file of weights, however it is named, that says what to give `instead`. Any other file
    passes.
    """
    what, cure = taken_for_folder(file)
    if what != NO_WEIGHTS:
        raise UserError(f"{name}: {what}; {instead or cure}")


def refuse_no_adapter(place: Path, key: str = "") -> NoReturn:
    """Raises: UserError that says what lies where an adapter is wanted."""
    what, cure = taken_for_folder(place) if place.is_file() else (f"no {ADAPTER_CONFIG} in it", "")
    if place.name != ADAPTER_WEIGHTS:
        cure = "name a PEFT adapter folder, or a run with one"
    raise UserError(f"{key}{place}: {what}; {cure}")


def pinned(source: Source) -> Source:
    """A folder as it is; a hub id with the commit that its revision stands for now, downloaded.

    Raises: UserError in one line.
    """
    return source if Path(source.name).is_absolute() else Source(source.name, folder_of(source).name)


def folder_of(source: Source, *, downloaded: bool = False) -> Path:
    """The local folder of a source; of a hub id the one in its cache, downloaded first unless it already is.

    Raises: UserError in one line.
    """
    folder = Path(source.name)
    if folder.is_absolute():
        return folder
    wanted: dict[str, Any] = {"local_files_only": True} if downloaded else {"allow_patterns": HUB_FILES}
    return snapshot(source.name, revision=source.revision, **wanted)
