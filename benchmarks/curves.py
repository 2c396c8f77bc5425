"""200 steps of the tiny recipe on the fast paths and on plain torch, eager attention and PEFT: are the losses the same?

    .venv/bin/python -m benchmarks.curves

Each strategy is trained in bf16 on both, and in float32 on plain torch, which stands for the truth. The fast paths may
be as far from it as the reference's own bf16 is. Writes benchmarks/results/curves.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.shared.record import ROOT, write_result

STEPS = 200
STRATEGIES = ("lora", "qlora")
PLAIN = {"GEMMA_FT_KERNELS": "off"}
ARMS: dict[str, tuple[list[str], dict[str, str]]] = {
    "float32, plain": (["train.precision=float32", "model.attention=eager"], PLAIN),
    "bf16, plain": (["train.precision=bf16", "model.attention=eager"], PLAIN),
    "bf16, fast": (["train.precision=bf16"], {}),
    "float32, fast": (["train.precision=float32"], {}),
}


def losses(strategy: str, arm: str, folder: Path) -> list[float]:
    """The training loss of each step."""
    overrides, environment = ARMS[arm]
    quantize = [] if strategy == "qlora" else ["quantize=null"]
    command = [sys.executable, "-m", "gemma_ft", "train", "recipes/sft_tiny.yaml", f"strategy={strategy}", *quantize,
               "data.eval=null", f"train.max_steps={STEPS}", f"output_dir={folder}", *overrides]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr, env=os.environ | environment)
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def distance(one: list[float], other: list[float]) -> dict[str, float]:
    """Mean and largest difference of two curves, and that of their last 20 steps' means."""
    apart = [abs(a - b) for a, b in zip(one, other, strict=True)]
    ends = [sum(curve[-20:]) / 20 for curve in (one, other)]
    return {"mean": round(sum(apart) / len(apart), 7), "largest": round(max(apart), 7),
            "at_the_end": round(abs(ends[0] - ends[1]), 7)}  # fmt: skip


def main() -> None:
    """All strategies and arms, and the result file."""
    found: dict[str, Any] = {}
    for strategy in STRATEGIES:
        with tempfile.TemporaryDirectory() as folder:
            curves = {arm: losses(strategy, arm, Path(folder) / str(n)) for n, arm in enumerate(ARMS)}
        truth = curves.pop("float32, plain")
        assert len(truth) == STEPS
        found[strategy] = {"first_and_last_loss": [truth[0], truth[-1]]} | {
            f"{arm}, from float32 plain": distance(curve, truth) for arm, curve in curves.items()
        }
        print(strategy, json.dumps(found[strategy], indent=2), flush=True)
    write_result("curves", also=("peft",), command="python -m benchmarks.curves", steps=STEPS, strategies=found)


if __name__ == "__main__":
    main()
