"""Where models and rows lie: what a user wrote becomes a folder of this machine, or a hub id and its commit.

Nothing here needs torch or transformers: rows are looked at without them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_ft.data.hub import snapshot
from gemma_ft.data.tokenizer import HUB_ID
from gemma_ft.errors import DataError, UserError
from gemma_ft.recipe.home import expanded
from gemma_ft.recipe.paths import locate, shipped_root

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


def model_source(name: str, revision: str | None = None, *, key: str = "") -> Source:
    """An absolute folder or a hub id out of what a user wrote; `key` begins the message of the error."""
    found = locate(name)
    if found is not None and found.is_dir():
        return Source(str(found.resolve()), None)
    if found is not None or not HUB_ID.fullmatch(name):
        raise UserError(f"{key}{name}: no such folder; name a folder with a model, or a hub id (owner/name)")
    return Source(name, revision)


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
