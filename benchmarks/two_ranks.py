"""sft_tiny in one process and with `--launch cpu_2ranks`, all of its steps: whether the result is the same.

.venv/bin/python -m benchmarks.two_ranks     writes benchmarks/results/two_ranks.json
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy
from safetensors.numpy import load_file

from benchmarks.demo import gemma_ft
from benchmarks.shared.record import write_result

WAYS: dict[str, list[str]] = {"one process": [], "--launch cpu_2ranks": ["--launch", "cpu_2ranks"]}


def train(out: Path, words: list[str]) -> dict[str, Any]:
    """A run's steps, its summary and its adapter."""
    gemma_ft("train", "recipes/sft_tiny.yaml", f"output_dir={out}", *words)
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return {"steps": steps, "summary": summary, "adapter": load_file(out / "adapter" / "adapter_model.safetensors")}


def main() -> None:
    """Both ways; what differs most, in relation to its value."""
    with tempfile.TemporaryDirectory() as place:
        one, two = (train(Path(place) / str(number), words) for number, words in enumerate(WAYS.values()))
    losses = [[step["loss"] for step in run["steps"]] for run in (one, two)]
    apart = {
        "first_10_losses": max(abs(a - b) / a for a, b in list(zip(*losses, strict=True))[:10]),
        "losses": max(abs(a - b) / a for a, b in zip(*losses, strict=True)),
        "adapter_norm": max(
            float(numpy.linalg.norm(value - two["adapter"][name]) / numpy.linalg.norm(value))
            for name, value in one["adapter"].items()
        ),
    }
    figures = {
        way: {
            "steps": len(run["steps"]),
            "tokens": run["summary"]["tokens"],
            "eval_after": run["summary"]["eval_after"],
        }
        for way, run in zip(WAYS, (one, two), strict=True)
    }
    write_result(
        "two_ranks",
        command="python -m benchmarks.two_ranks",
        figures=figures,
        relative_difference=apart,
    )
    print(json.dumps([figures, apart], indent=2))


if __name__ == "__main__":
    main()
