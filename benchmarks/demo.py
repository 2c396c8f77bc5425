"""Runs the tiny recipe in each strategy, one after the other, and writes benchmarks/results/demo.json: the figures that
README.md quotes, with machine, versions, commit and commands.

    .venv/bin/python -m benchmarks.demo
    .venv/bin/python -m benchmarks.demo lora     one strategy, end to end, to benchmarks/results/tiny.json
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.shared.record import ROOT, write_result
from benchmarks.shared.turns import QUICK

ARMS = {
    "qlora nf4 (make demo)": [],
    "qlora int8": ["quantize=int8"],
    "lora": ["strategy=lora"],
    "full": ["strategy=full"],
}
KEPT = ("steps", "tokens", "seconds", "tokens_per_second", "peak_bytes", "train_loss", "eval_before", "eval_after")


def measure(overrides: list[str], folder: Path) -> dict[str, Any]:
    """Train once through the command line, evaluate, and merge an adapter; the figures of summary, eval.json and the
    certificate.
    """
    begun = time.perf_counter()
    command = ["gemma-ft", "train", "recipes/sft_tiny.yaml", *overrides]
    gemma_ft(*command[1:], f"output_dir={folder}")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    figures = {"command": " ".join(command), **{key: summary[key] for key in KEPT}}
    gemma_ft("eval", str(folder))
    models = json.loads((folder / "eval.json").read_text(encoding="utf-8"))["models"]
    figures["eval"] = {model: {metric: one["value"] for metric, one in row.items()} for model, row in models.items()}
    if (folder / "adapter").is_dir():
        gemma_ft("merge", str(folder), "--out", str(folder / "merged"))
        figures["merge"] = json.loads((folder / "merged" / "merge.json").read_text(encoding="utf-8"))["certificate"]
    figures["seconds_end_to_end"] = round(time.perf_counter() - begun, 1)
    return figures


def gemma_ft(*arguments: str) -> None:
    """One verb of the command line."""
    subprocess.run([sys.executable, "-m", "gemma_ft", *arguments], cwd=ROOT, check=True, stdout=sys.stderr)


def main(names: list[str]) -> None:
    """Measure every arm, or those whose names begin with one of `names`, and write the result file."""
    chosen = {name: arm for name, arm in ARMS.items() if not names or name.startswith(tuple(names))}
    if not chosen:
        raise SystemExit(f"{' '.join(names)}: no such arm; there are {', '.join(ARMS)}")
    with tempfile.TemporaryDirectory() as folder:
        arms = {name: measure(overrides, Path(folder) / str(n)) for n, (name, overrides) in enumerate(chosen.items())}
    for name, arm in arms.items():
        loss, exact = arm["eval_after"]["loss"], arm["eval_after"]["exact_match"]
        print(f"{name}: {arm['seconds_end_to_end']} s end to end, loss {loss:.4f}, exact match {exact:.0%}")
    write_result("tiny" if names else "demo", arms=arms)


if __name__ == "__main__":
    if QUICK in sys.argv:
        ARMS = {name: [*arm, "train.max_steps=2", "eval.max_rows=8"] for name, arm in ARMS.items()}
    main([name for name in sys.argv[1:] if name != QUICK])
