"""CPU seconds of a start, now and at an earlier commit in turns: until the first token, the rows, the first step.

    .venv/bin/python -m benchmarks.starts COMMIT

With the published Gemma 2 tokenizer (python -m tests.real.fetch) and a random model of the tiny Gemma's shape, beside
stock transformers, which loads tokenizer and model and makes a token; and with the tiny Gemma as it ships, beside the
imports that training cannot do without. Every command has run once before. Writes benchmarks/results/starts.json.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.shared.record import ROOT, write_result
from benchmarks.shared.turns import in_turns, paired
from gemma_ft.families.records import PRESETS
from gemma_ft.model.gemma import GemmaForCausalLM
from tests.real.fetch import packages

TURNS = 3
STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=1)
"""
IMPORTS = "from trl import SFTTrainer; import peft, bitsandbytes"
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
TICKS = os.sysconf("SC_CLK_TCK")
# (what is asked, now's verb over before's)
RATIOS = ("generate, real tokenizer", "preview, real tokenizer", "first step, real tokenizer", "preview, tiny",
          "data check, tiny", "first step, tiny")  # fmt: skip


def run(words: list[str], tree: Path) -> float:
    """CPU seconds of a command of the code in `tree`, its children included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], cwd=tree, check=True, **QUIET)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)


def until_the_first_step(words: list[str], tree: Path) -> float:
    """CPU seconds until a run has written the loss of its first step; then it is ended."""
    folder = Path(tempfile.mkdtemp())
    command = [sys.executable, "-m", "gemma_ft", "train", *words, f"output_dir={folder / 'run'}",
               "train.max_steps=1000", "eval.generate_rows=0", "eval.max_rows=1"]  # fmt: skip
    log = folder / "run" / "metrics.jsonl"
    with subprocess.Popen(command, cwd=tree, **QUIET) as process:
        while not (log.exists() and '"loss"' in log.read_text(encoding="utf-8")):
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
            time.sleep(0.01)
        used = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:15]
        process.kill()
    shutil.rmtree(folder, ignore_errors=True)
    return sum(map(int, used)) / TICKS


def real_model(folder: Path) -> Path:
    """A random Gemma of the tiny preset's shape and 256,000 rows, with the published tokenizer."""
    torch.manual_seed(0)
    model = GemmaForCausalLM(PRESETS["gemma-tiny"].config(vocab_size=256_000)).to(torch.bfloat16)
    model.save_pretrained(str(folder))
    for file in packages()["gemma2"].folder.iterdir():
        shutil.copy(file, folder)
    return folder


def arms_of(tree: Path, model: Path, report: Path) -> dict[str, Callable[[], float]]:
    """What is started, with the code of one tree."""
    real = ["sft_tiny", f"model.weights={model}"]
    verb = ["-m", "gemma_ft"]
    return {
        "generate, real tokenizer": partial(
            run, [*verb, "generate", str(model), "--prompt", "Hello", "--max-tokens", "1"], tree
        ),
        "preview, real tokenizer": partial(run, [*verb, "preview", *real, "--rows", "1"], tree),
        "first step, real tokenizer": partial(until_the_first_step, real, tree),
        "preview, tiny": partial(run, [*verb, "preview", "sft_tiny", "--rows", "1"], tree),
        "data check, tiny": partial(run, [*verb, "data", "check", "sft_tiny", "--out", str(report)], tree),
        "first step, tiny": partial(until_the_first_step, ["sft_tiny"], tree),
    }


def main(commit: str) -> None:
    """Measure all in turns and write the result file."""
    with tempfile.TemporaryDirectory() as place:
        tree, model = Path(place) / "before", real_model(Path(place) / "model")
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tree)], check=True)
        subprocess.run(["git", "checkout", "--quiet", commit], cwd=tree, check=True)
        arms: dict[str, Callable[[], float]] = {}
        for name, code in (("now", ROOT), ("before", tree)):
            arms |= {f"{what}: {name}": arm for what, arm in arms_of(code, model, Path(place) / "report.json").items()}
        arms["transformers, real tokenizer"] = partial(run, ["-c", STOCK, str(model)], ROOT)
        arms["imports of a run"] = partial(run, ["-c", IMPORTS], ROOT)
        for arm in arms.values():
            arm()
        found = in_turns(arms, TURNS)
    ratios = {what: paired(found[f"{what}: now"], found[f"{what}: before"]) for what in RATIOS}
    ratios["generate over transformers"] = paired(
        found["generate, real tokenizer: now"], found["transformers, real tokenizer"]
    )
    above = [
        step - alone for step, alone in zip(found["first step, tiny: now"], found["imports of a run"], strict=True)
    ]
    seconds = {name: round(statistics.median(ones), 2) for name, ones in found.items()}
    print(seconds, ratios, above)
    write_result(
        "starts",
        command=f"python -m benchmarks.starts {commit}",
        before=commit,
        turns=TURNS,
        cpu_seconds=seconds,
        ratios=ratios,
        tiny_first_step_above_imports_s=round(statistics.median(above), 2),
    )


if __name__ == "__main__":
    main(sys.argv[1])
