"""The slowest ten operations of a training step on the CPU, of each arm of train_cpu.

    .venv/bin/python -m benchmarks.profile_cpu [before | after]

`before` and `after` name the place of the figures in benchmarks/results/profile_cpu.json; the other is kept. The arms
are processes of their own; each trains the rows of `lora_512`, and its third step is profiled.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.shared.hundred_million import write_base
from benchmarks.shared.record import ROOT, write_result
from benchmarks.shared.slowest import slowest
from benchmarks.train_cpu import ARMS, GRID, our_trainer, stock_trainer

LINES, STEP = ("lora_512",), 3


def one_arm(arm: str, name: str, folder: Path) -> None:
    """Train, and print the operations of one step by the time that they themselves take."""
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    from gemma_ft.system import environment

    environment.quiet_libraries()
    line = GRID[name]
    trainer = our_trainer(folder, line) if arm == "ours" else stock_trainer(folder, line, best=arm == "stock_best")
    watch = profile(activities=[ProfilerActivity.CPU])

    class Window(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == STEP - 1:
                watch.start()

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == STEP:
                watch.stop()

    trainer.add_callback(Window())
    trainer.train()
    print(json.dumps(slowest(watch)))


def main(place: str) -> None:
    """All arms, and the result file."""
    arms: dict[str, Any] = {}
    for name in LINES:
        with tempfile.TemporaryDirectory() as folder:
            write_base(Path(folder), GRID[name].vocabulary)
            for arm in ARMS if place == "after" else ARMS[:1]:  # the others do not change
                told = subprocess.run([sys.executable, "-m", "benchmarks.profile_cpu", arm, name, folder],
                                      check=True, capture_output=True, text=True)  # fmt: skip
                arms.setdefault(name, {})[arm] = json.loads(told.stdout.splitlines()[-1])
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    target = ROOT / "benchmarks" / "results" / "profile_cpu.json"
    known = json.loads(target.read_text()) if target.exists() else {}
    kept = {key: known[key] for key in ("before", "after") if key in known}
    write_result("profile_cpu", also=("peft", "trl"), command="python -m benchmarks.profile_cpu before | after",
                 **(kept | {place: {"commit": commit.strip(), "lines": arms}}))  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) == 4:
        one_arm(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    else:
        main(sys.argv[1] if len(sys.argv) > 1 else "after")
