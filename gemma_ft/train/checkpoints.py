"""The checkpoints of a run: folders `step-00000042` under `checkpoints/`, each valid when its manifest says so.

What the files hold is decided by whoever writes them.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from gemma_ft.errors import CheckpointError
from gemma_ft.system.files import fault_of

_NAME = re.compile(r"step-(\d{8})")


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies under `root`."""
    return root / f"step-{step:08d}"


def newest_valid(root: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint under `root` that verifies, or None when there is none at all; damaged ones that are newer
    are set aside under another name, and told to `warn`.

    Raises: CheckpointError when checkpoints exist and none verifies.
    """
    found = checkpoints_of(root)[::-1]
    damaged: list[tuple[Path, str]] = []
    for _, folder in found:
        fault = fault_of(folder)
        if fault is not None:
            damaged.append((folder, fault))
            continue
        for one, why in damaged:
            aside = next(path for path in _names_aside(one) if not path.exists())
            one.rename(aside)
            warn(f"{one}: {why}; set aside as {aside.name}, going on from {folder.name}")
        return folder
    if found:  # left as they are: a second try must not take this for a run that has no checkpoint yet
        raise CheckpointError(f"{root}: none of the {len(found)} checkpoints is intact; use --overwrite to start again")
    return None


def _names_aside(folder: Path) -> Iterator[Path]:
    yield folder.with_name(f"{folder.name}.damaged")
    for number in itertools.count(2):
        yield folder.with_name(f"{folder.name}.damaged-{number}")


def prune(root: Path, keep: int, *, spare: int | None = None) -> None:
    """Delete all but the newest `keep` checkpoints and that of step `spare`, oldest first, once the newest verifies."""
    found = checkpoints_of(root)
    if found and fault_of(found[-1][1]) is None:
        for step, folder in found[:-keep]:
            if step != spare:
                shutil.rmtree(folder)


def checkpoints_of(root: Path) -> list[tuple[int, Path]]:
    """Step and folder of each checkpoint under `root`, whole or not, oldest first."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match.group(1)), path))
    return sorted(found)
