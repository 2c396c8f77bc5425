"""Gather what the full fault suite counted into benchmarks/results/faults.json; `make faults` calls it.

.venv/bin/python -m benchmarks.faults build/faults
"""

import json
import sys
from pathlib import Path

from benchmarks.shared.record import write_result

# Figures of the field's list that no test here takes yet, or that stand elsewhere, and where.
ELSEWHERE: dict[str, str] = {
    "gradient equivalence <= 1e-10 in float64": "make test: tests/train/test_trainer.py::test_fault_27_*",
    "merge in float32 <= 5e-6": "benchmarks/results/merge.json",
    "control-token injection: 0 forged ids": "make test: tests/data/test_tokenizer.py, tests/data/test_chat.py",
    "faults on CUDA": "not done: no GPU was at hand",
}


def main() -> None:
    """Read a folder of figures, one file for each test, and write the result file."""
    files = sorted(Path(sys.argv[1]).glob("*.json"))
    figures = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    write_result(
        "faults", command="make faults", commits="of each figure: its own", figures=figures, elsewhere=ELSEWHERE
    )


if __name__ == "__main__":
    main()
