"""Preferences, before and after: `make demo-dpo`. A model that answers scheduling requests as JSON, its keys in one of
two orders, learns which order is preferred; what it answers to held-out requests is then counted.

    .venv/bin/python -m benchmarks.demo_dpo [KIND ...]       recipes/dpo_tiny.yaml, by each kind of objective in turn
    .venv/bin/python -m benchmarks.demo_dpo --real FOLDER    Gemma 3 270M (`make real` makes it): SFT, then DPO

Share of answers in the preferred form, share that is right whatever its form, and mean length, by greedy answers of the
start and of what was trained. Runs lie in runs/demo_dpo*; figures go to benchmarks/results/demo_dpo.json and
demo_dpo_real.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.demo_real import TRAINING
from benchmarks.shared.preferred_form import answered, as_figures, pairs_in
from benchmarks.shared.record import ROOT, write_result

START, HELD_OUT = "data/scheduling-adapter", "data/preferences_eval.jsonl"
RUN, REAL = Path("runs/demo_dpo"), Path("runs/demo_dpo_real")
KINDS = ("dpo", "ipo", "orpo", "kto", "simpo")
SHOWN = 3
KEPT = ("steps", "tokens", "seconds", "peak_bytes", "train_loss", "eval_before", "eval_after")
# the answers are counted here, once; a run without its own is what is timed
QUIET = ("eval.generate_rows=0", "eval.samples=0", "eval.canary=null")
SFT_STEPS, DPO_STEPS, PAIRS = 150, 16, 16  # of the 270M: steps of two sequences of 512 tokens; steps of so many pairs
REAL_DPO = ("data.max_seq_len=512", f"train.global_batch_size={PAIRS}", "train.micro_batch_size=2",
            "eval.every_steps=null", "checkpoint.every_steps=null")  # fmt: skip


def gemma_ft(*arguments: str | Path) -> None:
    """One verb of the command line."""
    subprocess.run([sys.executable, "-m", "gemma_ft", *map(str, arguments)], cwd=ROOT, check=True, stdout=sys.stderr)


def cpu_seconds_of_children() -> float:
    """CPU time of the child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def trained(recipe: str, out: Path, *overrides: str) -> dict[str, Any]:
    """The figures of one run of preferences; cpu_seconds: of all cores, which others on the machine change less."""
    command, begun = ["train", recipe, *overrides], cpu_seconds_of_children()
    gemma_ft(*command, f"output_dir={out}", "--overwrite", *QUIET)
    cpu = round(cpu_seconds_of_children() - begun, 1)
    summary = json.loads((ROOT / out / "summary.json").read_text(encoding="utf-8"))
    ordered = [summary[when].get("rewards/accuracies") for when in ("eval_before", "eval_after")]
    if None not in ordered:  # kto compares no pairs
        print(f"{out}: held-out pairs that rewards order rightly, ties a half: {ordered[0]:.0%}, then {ordered[1]:.0%}")
    return {"command": " ".join(["gemma-ft", *command]), **{key: summary[key] for key in KEPT}, "cpu_seconds": cpu}


def compared(start: str | Path, run: Path, pairs: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Forms of the answers before and after, and a few of them side by side."""
    before, said = answered(ROOT / start, pairs)
    after, says = answered(ROOT / run, pairs)
    print(f"{run}\n  before  {before.in_words()}\n  after   {after.in_words()}")
    samples = [{"asked": pair["prompt"], "before": old, "after": new}
               for pair, old, new in zip(pairs[:SHOWN], said, says, strict=False)]  # fmt: skip
    return {"before": as_figures(before), "after": as_figures(after), "samples": samples}


def tiny(kinds: Sequence[str], rows: int | None) -> None:
    """Each kind of objective from the adapter that ships."""
    pairs, arms = pairs_in(ROOT / HELD_OUT, rows), {}
    for kind in kinds:
        out = RUN.with_name(f"{RUN.name}_{kind}")
        begun = time.perf_counter()
        figures = trained("recipes/dpo_tiny.yaml", out, *([] if kind == "dpo" else [f"objective.kind={kind}"]))
        arms[kind] = {**figures, "seconds_end_to_end": round(time.perf_counter() - begun, 1),
                      **compared(START, out, pairs)}  # fmt: skip
    for sample in arms[kinds[0]]["samples"]:
        print(f"{sample['asked']}\n  before  {sample['before']}\n  after   {sample['after']}")
    write_result("demo_dpo", start=START, arms=arms)


def real(folder: Path, rows: int | None, steps: int | None) -> None:
    """The real 270M: tuned on answers in both orders, and then by DPO."""
    weights, sft = f"model.weights={folder.resolve()}", REAL.with_name(f"{REAL.name}_sft")
    orders = ROOT / "build" / "tiny" / "orders.jsonl"
    subprocess.run([sys.executable, "data/tiny_corpus.py", "orders", orders], cwd=ROOT, check=True, stdout=sys.stderr)
    gemma_ft("train", "sft_gemma3_270m", "--overwrite", weights, *TRAINING, *QUIET, f"output_dir={sft}",
             f"data.train={orders}", "data.eval=data/scheduling_eval.jsonl", "data.eval_fraction=0.0",
             f"train.max_steps={steps or SFT_STEPS}", "eval.every_steps=null", "eval.max_rows=20")  # fmt: skip
    figures = trained("dpo_gemma3_270m", REAL, weights, f"adapter.start={sft}", "data.eval_fraction=0.0",
                      f"data.eval={HELD_OUT}", *REAL_DPO,
                      f"train.max_steps={steps or DPO_STEPS}")  # fmt: skip
    figures["command"] = figures["command"].replace(str(folder.resolve()), "FOLDER")
    write_result("demo_dpo_real", sft_steps=steps or SFT_STEPS, **figures,
                 **compared(sft, REAL, pairs_in(ROOT / HELD_OUT, rows)))  # fmt: skip


def main() -> None:
    """Command line: see the top of this file."""
    parser = argparse.ArgumentParser(description="Train preferences, and count what is answered before and after.")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--real", type=Path, metavar="FOLDER", help="A model folder with Gemma 3 270M.")
    parser.add_argument("--rows", type=int, metavar="N", help="So many held-out requests; all of them if not given.")
    parser.add_argument("--steps", type=int, metavar="N", help="So many steps of the 270M, to see that it runs.")
    given = parser.parse_args()
    for kind in set(given.kinds) - set(KINDS):
        parser.error(f"{kind}: no such kind of objective; there are {', '.join(KINDS)}")
    if given.real is None:
        tiny(given.kinds or KINDS[:1], given.rows)
    elif (given.real / "config.json").is_file():
        real(given.real, given.rows, given.steps)
    else:
        parser.error(f"{given.real}: no model folder; `make real` makes one")


if __name__ == "__main__":
    main()
