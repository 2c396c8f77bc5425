"""What lies under the checkpoints of a run, and what of it is removed when somebody asks."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma_ft.errors import CheckpointError, UserError
from gemma_ft.system.files import fault_of
from gemma_ft.train.checkpoint_state import load_state
from gemma_ft.train.checkpoints import checkpoints_of, prune
from gemma_ft.train.run_dir import RunDir


@dataclass(frozen=True)
class CheckpointFacts:
    """A checkpoint, or one that was set aside as damaged."""

    folder: Path
    step: int | None  # None, as `loss`, where its state cannot be read
    loss: float | None
    made: float  # seconds since the epoch
    bytes: int
    aside: bool
    fault: str | None  # what is wrong with it, where somebody looked


def list_checkpoints(root: Path, *, verify: bool) -> list[CheckpointFacts]:
    """The checkpoints of the run in `root`, oldest first, then those that were set aside. `verify`: read and hash every
    file of the others.

    Raises: UserError when there is no run.
    """
    run = RunDir(root)
    if not run.recipe.is_file():
        raise UserError(f"{root}: not a run, there is no recipe.yaml in it; give a run directory")
    found = [folder for _, folder in checkpoints_of(run.checkpoints)]
    aside = sorted(path for path in run.checkpoints.glob("step-*.damaged*") if path.is_dir())
    faults = {folder: fault_of(folder) if verify else None for folder in found}
    facts = [_facts(folder, aside=False, fault=fault) for folder, fault in faults.items()]
    return facts + [_facts(folder, aside=True, fault=None) for folder in aside]


def remove_checkpoints(root: Path, listed: Sequence[CheckpointFacts], *, keep: int) -> list[Path]:
    """Of the `listed` ones of the run in `root`, remove all but the newest so many, once the newest is verified, and
    those that were set aside. Returns what is gone.

    Raises: CheckpointError when the newest is not whole; LockedError when a run is writing.
    """
    run = RunDir(root)
    found = [one.folder for one in listed if not one.aside]
    with run.locked():
        newest = fault_of(found[-1]) if found else "missing"
        if newest is not None:
            raise CheckpointError(f"{run.checkpoints}: nothing is removed, for the newest is not whole: {newest}")
        best = load_state(found[-1]).get("extra", {}).get("best") or {}
        prune(run.checkpoints, keep, spare=best.get("step"))
        for one in listed:
            if one.aside:
                shutil.rmtree(one.folder)
        return [one.folder for one in listed if not one.folder.exists()]


def _facts(folder: Path, *, aside: bool, fault: str | None) -> CheckpointFacts:
    loss = step = None
    with contextlib.suppress(OSError, ValueError, KeyError):
        state = load_state(folder)
        step, loss = state["step"], state["last_loss"]
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    return CheckpointFacts(folder, step, loss, folder.stat().st_mtime, size, aside, fault)
