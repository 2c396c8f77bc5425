"""`gemma-ft checkpoints` as a person sees it: a table, and what was removed."""

from __future__ import annotations

import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gemma_ft.errors import CheckpointError
from gemma_ft.recipe.run_files import RunFiles
from gemma_ft.system.units import byte_size, number
from gemma_ft.train.checkpoint_list import CheckpointFacts, list_checkpoints, remove_checkpoints


def show_checkpoints(root: Path, *, verify: bool, keep: int | None, console: Console) -> int:
    """A table of the checkpoints of a run, oldest first. `verify`: read and hash every file. `keep`: afterwards remove
    all but the newest so many, once the newest is verified, and those that were set aside as damaged.

    Returns 0; CheckpointError.exit_code when `verify` found damage. Raises: UserError when there is no run; LockedError
    when a run is writing and something is to be removed.
    """
    listed = list_checkpoints(root, verify=verify)
    if not listed:
        console.print(f"{root}: no checkpoints; checkpoint.every_steps says when they are made", highlight=False)
        return 0
    title = str(RunFiles(root).checkpoints)
    table = Table("step", "loss", "made", "size", "whole" if verify else "", title=title)
    for one in listed:
        table.add_row(*_row(one, verified=verify))
    console.print(table)
    if keep is not None:
        gone = remove_checkpoints(root, listed, keep=keep)
        console.print(f"removed {len(gone)}: {', '.join(path.name for path in gone) or 'nothing'}", highlight=False)
    return CheckpointError.exit_code if any(one.fault for one in listed) else 0


def _row(one: CheckpointFacts, *, verified: bool) -> tuple[str, str, str, str, str]:
    name = str(one.step) if one.step is not None else one.folder.name
    made = datetime.datetime.fromtimestamp(one.made).strftime("%Y-%m-%d %H:%M:%S")
    verdict = "set aside as damaged" if one.aside else (one.fault or "yes") if verified else ""
    return name, number(one.loss), made, byte_size(one.bytes, "MB", ",.1f"), verdict
