"""The user's own proof, on the user's own machine, that a run which is killed goes on as if it had not been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gemma_ft.errors import CheckpointError, UserError
from gemma_ft.recipe.batch_plan import batch_plan
from gemma_ft.recipe.load import LoadedRecipe
from gemma_ft.recipe.run_files import RunFiles
from gemma_ft.system import hardware
from gemma_ft.system.files import file_hash

STEPS = 3  # before the kill, and as many after it
EXACT = ("step", "loss", "learning_rate", "grad_norm", "tokens")
NEAR = 1e-6  # relative difference of losses where sums are made in another order: other ranks, or a GPU
PLAIN = (
    f"train.max_steps={2 * STEPS}", f"checkpoint.every_steps={STEPS}", "checkpoint.keep=9", "eval.every_steps=null",
    "eval.generate_rows=0", "eval.samples=0", "eval.canary=null", "logging.wandb=disabled", "logging.tensorboard=false",
    "logging.every_steps=1",
)  # fmt: skip


def prove_resume(loaded: LoadedRecipe, words: Sequence[str], say: Callable[[str], None]) -> int:
    """Train a few steps of a recipe without a break, and with one: killed, and resumed, also on another number of ranks
    where the recipe's batch allows it. `words`: the recipe and its overrides, as they were given.

    Everything happens in a temporary folder. Returns 0. Raises: CheckpointError naming the first step that differs.
    """
    exact = hardware.default_device().type == "cpu"
    with tempfile.TemporaryDirectory(prefix="gemma-ft-prove-") as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        _train(words, whole)
        say(f"whole      {2 * STEPS} steps without a break")
        _train_and_kill(words, broken)
        say(f"killed     after step {_steps(broken)[-1]['step']}, with a checkpoint of step {STEPS}")
        _train(words, broken, "--resume")
        _compare(whole, broken, exact=exact)
        same = "losses, learning rates, gradients, tokens and the final weights are the same, bit for bit"
        say(f"resumed    {same if exact else f'losses are the same within {NEAR:g}'}")
        ranks = _other_ranks(loaded)
        if ranks is None:
            say("ranks      not tried: the recipe's global batch, or this machine, does not allow for two")
            return 0
        moved = Path(folder) / "moved"
        _train_and_kill(words, moved)
        _train(words, moved, "--resume", "--launch", "ddp", "--nproc", str(ranks))
        _compare(whole, moved, exact=False)
        say(f"moved      killed on 1 rank, resumed on {ranks}: losses are the same within {NEAR:g}")
    return 0


def _train(words: Sequence[str], out: Path, *more: str) -> None:
    process = _start(words, out, *more)
    _, said = process.communicate()
    if process.returncode:
        raise UserError(f"the proof cannot be made, a run failed: {_last_line(said)}")


def _train_and_kill(words: Sequence[str], out: Path) -> None:
    """Train until a step past the checkpoint is computed, then kill: nothing can be tidied up."""
    process = _start(words, out)
    while len(_steps(out)) <= STEPS:
        if process.poll() is not None:
            _, said = process.communicate()
            if process.returncode:
                raise UserError(f"the proof cannot be made, a run failed: {_last_line(said)}")
            break  # it was through before it could be killed
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    RunFiles(out).summary.unlink(missing_ok=True)


def _start(words: Sequence[str], out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gemma_ft", "train", *words, *PLAIN, f"output_dir={out}", *more]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _steps(out: Path) -> list[dict[str, Any]]:
    """The steps that a run has logged; a line that is just being written does not count."""
    path = RunFiles(out).metrics
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _compare(whole: Path, other: Path, *, exact: bool) -> None:
    for mine, theirs in zip(_steps(whole), _steps(other), strict=True):
        if exact:
            different = [key for key in EXACT if mine[key] != theirs[key]]
        else:
            far = abs(mine["loss"] - theirs["loss"]) > NEAR * abs(mine["loss"])
            different = ["loss"] * far + [key for key in ("step", "tokens") if mine[key] != theirs[key]]
        if different:
            key = different[0]
            raise CheckpointError(f"step {mine['step']}: {key} {theirs[key]} after the resume, {mine[key]} without")
    run = RunFiles(whole)
    results = [path for folder in (run.adapter, run.model) for path in sorted(folder.glob("*.safetensors")) if exact]
    for path in results:
        if file_hash(path) != file_hash(other / path.relative_to(whole)):
            raise CheckpointError(f"{path.name}: other bytes after the resume than without")


def _other_ranks(loaded: LoadedRecipe) -> int | None:
    """Two, where there are two devices and the global batch can be dealt to them in micro-batches of the same size:
    dropout draws for each micro-batch.
    """
    import torch

    devices = torch.cuda.device_count() if torch.cuda.is_available() else os.cpu_count() or 1
    try:
        plan = batch_plan(loaded.recipe, 2)
    except UserError:
        return None
    return 2 if devices >= 2 and plan.micro_batch_size == loaded.recipe.train.micro_batch_size else None


def _last_line(said: str) -> str:
    return next(iter(said.strip().splitlines()[::-1]), "it said nothing")
