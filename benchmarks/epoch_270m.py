"""How long an epoch of 1,000 rows takes by recipes/sft_gemma3_270m.yaml on this machine, to
benchmarks/results/epoch_270m.json.

    .venv/bin/python -m benchmarks.epoch_270m MODEL            a whole epoch; MODEL: a folder with Gemma 3 270M
    .venv/bin/python -m benchmarks.epoch_270m MODEL STEPS      so many steps after the first, and the epoch reckoned

Rows are the first 1,000 of the scheduling set that ships. Nothing is evaluated. `seconds` are those of the clock;
`cpu_seconds` what the process took of all cores meanwhile, which others on the machine change less.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from benchmarks.shared.record import ROOT, write_result

RECIPE, ROWS = "sft_gemma3_270m", 1000


class Steps(threading.Thread):
    """Watches metrics.jsonl: the clock and the process's CPU time when each line was written."""

    def __init__(self, file: Path) -> None:
        super().__init__(daemon=True)
        self.file, self.seen, self.over = file, [], threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.05):
            lines = self.file.read_text().count("\n") if self.file.exists() else 0
            if lines > len(self.seen):
                self.seen += [(time.perf_counter(), time.process_time())] * (lines - len(self.seen))


def one_run(model: str, rows: str, out: str, steps: int | None) -> None:
    """Train, and print tokens of an epoch, and of each step after the first tokens, seconds, CPU seconds."""
    from gemma_ft.cli.app import main as gemma_ft

    watch = Steps(Path(out) / "metrics.jsonl")
    watch.start()
    given = [f"model.weights={model}", f"data.train={rows}", f"output_dir={out}", "data.eval_fraction=0",
             "eval.every_steps=null", "eval.generate_rows=0", "eval.samples=0", "eval.canary=null"]  # fmt: skip
    code = gemma_ft(["train", RECIPE, *given, *([f"train.max_steps={steps + 1}"] if steps else [])])
    watch.over.set()
    watch.join()
    assert code == 0, code
    lines = [json.loads(line) for line in watch.file.read_text().splitlines()]
    told = [one for one in lines if "tokens" in one][: len(watch.seen)]
    first, last = told[0], told[-1]
    (began, cpu_began), (ended, cpu_ended) = watch.seen[0], watch.seen[len(told) - 1]
    print(json.dumps({"steps": len(told) - 1, "tokens": last["tokens"] - first["tokens"], "seconds": ended - began,
                      "cpu_seconds": cpu_ended - cpu_began}))  # fmt: skip


def epoch_tokens(model: str, rows: str) -> tuple[int, int]:
    """Tokens and sequences of the packed epoch."""
    from gemma_ft.build.data import build_data
    from gemma_ft.build.inputs import build_tokenizer
    from gemma_ft.recipe.load import load_recipe

    given = [f"model.weights={model}", f"data.train={rows}", "data.eval_fraction=0", "output_dir=unused"]
    recipe = load_recipe(RECIPE, given).recipe
    stats = build_data(recipe, build_tokenizer(recipe)).train.stats
    return stats.tokens, stats.packed_rows


def main(model: str, steps: int | None = None) -> int:
    """Measure and write the result file."""
    model = str(Path(model).resolve())
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as place:
        rows, out = f"{place}/rows.jsonl", f"{place}/run"
        whole = (ROOT / "data" / "scheduling_train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        Path(rows).write_text("".join(whole[:ROWS]), encoding="utf-8")
        arguments = [sys.executable, "-m", "benchmarks.epoch_270m", "--run", model, rows, out, str(steps or 0)]
        told = subprocess.run(arguments, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        measured = json.loads(told.stdout.splitlines()[-1])
        tokens, sequences = epoch_tokens(model, rows)
    cores = torch.get_num_threads()
    of_epoch = tokens / measured["tokens"]
    epoch = {"tokens": tokens, "sequences": sequences, "minutes": round(measured["seconds"] * of_epoch / 60, 1),
             "minutes_of_its_own_cores": round(measured["cpu_seconds"] / cores * of_epoch / 60, 1)}  # fmt: skip
    write_result("epoch_270m", command="python -m benchmarks.epoch_270m MODEL" + (f" {steps}" if steps else ""),
                 recipe=RECIPE, rows=ROWS, threads=cores, load_before=round(load, 1),
                 measured={key: round(value, 1) for key, value in measured.items()}, epoch=epoch)  # fmt: skip
    print(epoch)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        one_run(*sys.argv[2:5], steps=int(sys.argv[5]) or None)
    else:
        sys.exit(main(sys.argv[1], *map(int, sys.argv[2:3])))
