"""The CPU's benchmarks, one after the other, each a process of its own that writes its result file; then their tables.

    .venv/bin/python -m benchmarks                  all parts, about a quarter of an hour on two cores (make bench)
    .venv/bin/python -m benchmarks PART ...         some of them
    .venv/bin/python -m benchmarks --list           what there is
    .venv/bin/python -m benchmarks --quick ...      one turn of little work, written to build/bench: does it run?

BENCH_OUT=FOLDER keeps benchmarks/results as it is and writes there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from benchmarks.page_performance import columns, rows_of
from benchmarks.shared.record import RESULTS, ROOT
from benchmarks.shared.turns import QUICK

# part: its command after `python -m benchmarks.`; it is also the name of what it writes and of its table
PARTS = {
    "startup": ["startup"],
    "merge_speed": ["merge_speed"],
    "decode_cpu": ["decode_cpu"],
    "tiny": ["demo", "lora"],
    "train_cpu": ["train_cpu", "--brief", "lora_512", "lora_2048", "qlora_2048"],
}


def run(part: str, *, quick: bool) -> bool:
    """Run a part and show its table; whether it went well."""
    module, *arguments = PARTS[part]
    arguments += [QUICK] if quick else []
    folder = ROOT / "build" / "bench" if quick else RESULTS
    print(f"{part}: python -m benchmarks.{' '.join([module, *arguments])}", flush=True)
    begun = time.perf_counter()
    told = subprocess.run([sys.executable, "-m", f"benchmarks.{module}", *arguments], cwd=ROOT, check=False,
                          env=os.environ | {"BENCH_OUT": str(folder)}, capture_output=True, text=True)  # fmt: skip
    print(f"{part}: {time.perf_counter() - begun:.0f} s", flush=True)
    if told.returncode:
        print((told.stdout + told.stderr)[-4000:], file=sys.stderr)
        print(f"{part}: failed with exit code {told.returncode}", file=sys.stderr)
        return False
    print(columns(rows_of(part, folder)) + "\n", flush=True)
    return True


def main(names: list[str]) -> int:
    """Run parts by name, or all; 1 where one failed, 2 for a name that is none."""
    quick, names = QUICK in names, [name for name in names if name != QUICK]
    if names == ["--list"]:
        print("\n".join(f"{part}: python -m benchmarks.{' '.join(command)}" for part, command in PARTS.items()))
        return 0
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        print(f"{unknown[0]}: no such part; there are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    went = [run(part, quick=quick) for part in PARTS if not names or part in names]  # a part that fails stops no other
    return int(not all(went))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
