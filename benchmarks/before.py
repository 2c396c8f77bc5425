"""The tiny recipe, now and at an earlier commit, on the same machine in turns: is the whole of it faster?

    .venv/bin/python -m benchmarks.before COMMIT

Writes benchmarks/results/before.json: seconds of `gemma-ft train recipes/sft_tiny.yaml` with its scoring before and
after, and tokens per second of its training.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.shared.record import ROOT, write_result
from benchmarks.shared.turns import in_turns, paired

STRATEGIES = {
    "qlora nf4 (make demo)": [],
}
TURNS = 2


def trained(tree: Path, overrides: list[str]) -> dict[str, float]:
    """Train once with the code of a tree."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "gemma_ft", "train", "recipes/sft_tiny.yaml", f"output_dir={folder}/run",
                        *overrides], cwd=tree, check=True, stdout=subprocess.DEVNULL)  # fmt: skip
        seconds = time.perf_counter() - begun
        summary: dict[str, Any] = json.loads((Path(folder) / "run" / "summary.json").read_text(encoding="utf-8"))
    return {
        "seconds": seconds,
        "tokens_per_second": summary["tokens_per_second"],
        "loss": summary["eval_after"]["loss"],
    }


def main(commit: str) -> None:
    """Measure in turns and write the result file."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        tree = Path(place) / "before"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tree)], check=True)
        subprocess.run(["git", "checkout", "--quiet", commit], cwd=tree, check=True)
        for name, overrides in STRATEGIES.items():
            arms = {"now": lambda o=overrides: trained(ROOT, o), "before": lambda o=overrides: trained(tree, o)}
            runs = in_turns(arms, TURNS)
            found[name] = {
                key: {arm: round(statistics.median(one[key] for one in ones), 5) for arm, ones in runs.items()}
                for key in ("seconds", "tokens_per_second", "loss")
            } | {
                "times_as_fast": paired(
                    [one["seconds"] for one in runs["before"]], [one["seconds"] for one in runs["now"]]
                )
            }
            print(name, json.dumps(found[name]), flush=True)
    write_result("before", command=f"python -m benchmarks.before {commit}", before=commit, strategies=found)


if __name__ == "__main__":
    main(sys.argv[1])
