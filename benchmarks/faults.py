"""Gather what the full fault suite counted into benchmarks/results/faults.json; `make faults` calls it.

.venv/bin/python -m benchmarks.faults build/faults
"""

import json
import sys
from pathlib import Path

from benchmarks.record import write_result

# Figures of the reliability page that no test here takes yet, and why.
NOT_DONE: dict[str, str] = {}


def main() -> None:
    """Read a folder of figures, one file for each test, and write the result file."""
    files = sorted(Path(sys.argv[1]).glob("*.json"))
    figures = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    write_result("faults", command="make faults", figures=figures, not_done=NOT_DONE)


if __name__ == "__main__":
    main()
