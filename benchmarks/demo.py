"""Runs the tiny recipe in each strategy, one after the other, and writes benchmarks/results/demo.json: the figures that
README.md quotes, with machine, versions, commit and commands.

    .venv/bin/python benchmarks/demo.py
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ARMS = {
    "qlora nf4 (make demo)": [],
    "qlora int8": ["quantize=int8"],
    "lora": ["strategy=lora"],
    "full": ["strategy=full"],
}
KEPT = ("steps", "tokens", "seconds", "tokens_per_second", "peak_bytes", "train_loss", "eval_before", "eval_after")


def processor() -> str:
    """The name of the processor, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def measure(overrides: list[str], folder: Path) -> dict[str, Any]:
    """Train once through the command line; the figures of its summary."""
    command = ["gemma-ft", "train", "recipes/sft_tiny.yaml", *overrides]
    python = [sys.executable, "-m", "gemma_ft", *command[1:]]
    subprocess.run([*python, f"output_dir={folder}"], cwd=ROOT, check=True)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {"command": " ".join(command), **{key: summary[key] for key in KEPT}, "versions": summary["versions"]}


def main() -> None:
    """Measure every arm and write the result file."""
    with tempfile.TemporaryDirectory() as folder:
        arms = {name: measure(overrides, Path(folder) / str(n)) for n, (name, overrides) in enumerate(ARMS.items())}
    versions, *_ = [arm.pop("versions") for arm in arms.values()]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    result = {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "accelerator": None},
        "versions": versions,
        "commit": commit.strip(),
        "arms": arms,
    }
    target = ROOT / "benchmarks" / "results" / "demo.json"
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(target.relative_to(ROOT))


if __name__ == "__main__":
    main()
