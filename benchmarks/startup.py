"""Seconds until the command line answers, until rows are shown, and until the first training step has been made; and
those of TRL's command line and of its trainer's import. Writes benchmarks/results/startup.json.

    .venv/bin/python -m benchmarks.startup
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks.shared.record import ROOT, write_result
from benchmarks.shared.turns import QUICK, in_turns, paired

TURNS = 3
PYTHON = sys.executable
VERBS = {
    "--help": [PYTHON, "-m", "gemma_ft", "--help"],
    "recipes": [PYTHON, "-m", "gemma_ft", "recipes"],
    "preview": [PYTHON, "-m", "gemma_ft", "preview", "recipes/sft_tiny.yaml"],
    "trl --help": [str(Path(PYTHON).with_name("trl")), "--help"],
    "import of SFTTrainer": [PYTHON, "-c", "from trl import SFTTrainer"],
}
FIRST_STEP = "first step of recipes/sft_tiny.yaml"
PAIRS = (("--help", "trl --help"), (FIRST_STEP, "import of SFTTrainer"))


def until_it_ends(command: list[str]) -> float:
    """Seconds that a command takes."""
    begun = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begun


def until_the_first_step() -> float:
    """Seconds until a run has written the loss of its first step."""
    run = Path(tempfile.mkdtemp())
    command = [PYTHON, "-m", "gemma_ft", "train", "recipes/sft_tiny.yaml", f"output_dir={run / 'run'}",
               "train.max_steps=1", "eval.generate_rows=0", "eval.max_rows=1"]  # fmt: skip
    begun = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        log = run / "run" / "metrics.jsonl"
        while not (log.exists() and '"loss"' in log.read_text(encoding="utf-8")):
            if process.poll() is not None:
                break
            time.sleep(0.02)
        seconds = time.perf_counter() - begun
    shutil.rmtree(run, ignore_errors=True)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return seconds


def main(turns: int = TURNS) -> None:
    """Measure all in turns and write the result file."""
    arms = {name: partial(until_it_ends, command) for name, command in VERBS.items()}
    found = in_turns({**arms, FIRST_STEP: until_the_first_step}, turns)
    seconds = {name: round(statistics.median(ones), 2) for name, ones in found.items()}
    ratios = {f"{theirs}, over {ours}": paired(found[theirs], found[ours]) for ours, theirs in PAIRS}
    print(seconds)
    write_result("startup", also=("trl",), command="python -m benchmarks.startup", turns=turns, seconds=seconds,
                 ratios=ratios)  # fmt: skip


if __name__ == "__main__":
    main(1 if QUICK in sys.argv else TURNS)
