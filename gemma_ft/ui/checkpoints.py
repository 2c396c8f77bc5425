"""What lies under the checkpoints of a run, for a person."""

from __future__ import annotations

import contextlib
import datetime
import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gemma_ft.errors import CheckpointError, UserError
from gemma_ft.system.files import fault_of
from gemma_ft.system.units import number
from gemma_ft.train.checkpoint_state import load_state
from gemma_ft.train.checkpoints import checkpoints_of, prune
from gemma_ft.train.run_dir import RunDir


def show_checkpoints(root: Path, *, verify: bool, keep: int | None, console: Console) -> int:
    """A table of the checkpoints of a run, oldest first. `verify`: read and hash every file. `keep`: afterwards remove
    all but the newest so many, once the newest is verified, and those that were set aside as damaged.

    Returns 0; CheckpointError.exit_code when `verify` found damage. Raises: UserError when there is no run; LockedError
    when a run is writing and something is to be removed.
    """
    run = RunDir(root)
    if not run.recipe.is_file():
        raise UserError(f"{root}: not a run, there is no recipe.yaml in it; give a run directory")
    found = [folder for _, folder in checkpoints_of(run.checkpoints)]
    aside = sorted(path for path in run.checkpoints.glob("step-*.damaged*") if path.is_dir())
    if not found and not aside:
        console.print(f"{root}: no checkpoints; checkpoint.every_steps says when they are made", highlight=False)
        return 0
    faults = {folder: fault_of(folder) if verify else None for folder in found}
    table = Table("step", "loss", "made", "size", "whole" if verify else "", title=str(run.checkpoints))
    for folder in found:
        verdict = (faults[folder] or "yes") if verify else ""
        table.add_row(*_row(folder), verdict)
    for folder in aside:
        table.add_row(*_row(folder), "set aside as damaged")
    console.print(table)
    if keep is not None:
        _remove(run, found, aside, keep, console)
    return CheckpointError.exit_code if any(faults.values()) else 0


def _row(folder: Path) -> tuple[str, str, str, str]:
    loss = step = None
    with contextlib.suppress(OSError, ValueError, KeyError):
        state = load_state(folder)
        step, loss = state["step"], state["last_loss"]
    files = [path.stat() for path in folder.iterdir() if path.is_file()]
    made = datetime.datetime.fromtimestamp(folder.stat().st_mtime).strftime("%Y-%m-%d %H:%M:%S")
    size = sum(one.st_size for one in files)
    return str(step if step is not None else folder.name), number(loss), made, f"{size / 1e6:,.1f} MB"


def _remove(run: RunDir, found: list[Path], aside: list[Path], keep: int, console: Console) -> None:
    with run.locked():
        newest = fault_of(found[-1]) if found else "missing"
        if newest is not None:
            raise CheckpointError(f"{run.checkpoints}: nothing is removed, for the newest is not whole: {newest}")
        best = load_state(found[-1]).get("extra", {}).get("best") or {}
        prune(run.checkpoints, keep, spare=best.get("step"))
        for folder in aside:
            shutil.rmtree(folder)
        gone = [folder for folder in (*found, *aside) if not folder.exists()]
    console.print(f"removed {len(gone)}: {', '.join(path.name for path in gone) or 'nothing'}", highlight=False)
