"""A checkpoint written: safetensors and JSON that appear complete, in place of Trainer's pickles written in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemma_ft.system.files import commit_folder
from gemma_ft.train import checkpoint_state
from gemma_ft.train.checkpoints import checkpoint_folder, prune
from gemma_ft.train.distributed import World


def commit_checkpoint(
    root: Path,
    step: int,
    *,
    model: Any,
    optimizer: Any,
    world: World,
    progress: dict[str, Any],
    write_more: Callable[[Path], None],
    keep: int,
) -> None:
    """Write the checkpoint of a step below `root`, and remove those past the newest `keep` but the best one.

    `write_more(folder)`: what else lies in it. Every rank takes part in what is gathered, also when the one that writes
    cannot begin to. Raises: DiskError where there is no space, NonFiniteError where a weight is not finite.
    """
    begun = False

    def write(folder: Path | None) -> None:
        nonlocal begun
        begun = True
        checkpoint_state.save_weights(folder, model, world)
        checkpoint_state.save_optimizer(folder, optimizer, model, world)
        if folder is not None:
            checkpoint_state.save_state(folder, progress)
            write_more(folder)

    if not world.main:
        write(None)
        return
    try:
        commit_folder(checkpoint_folder(root, step), write, bytes_needed=checkpoint_state.bytes_of(model))
        prune(root, keep, spare=progress["extra"].get("best", {}).get("step"))
    except Exception:
        if not begun:
            write(None)
        raise
