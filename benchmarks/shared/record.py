"""Result files: what was measured, on which machine, with which versions, at which commit."""

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gemma_ft.system import environment
from gemma_ft.system.hardware import cpu_flags

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "benchmarks" / "results"
RESULTS = Path(os.environ.get("BENCH_OUT") or PUBLISHED)  # BENCH_OUT: a trial, or a machine that keeps another folder


def write_result(name: str, *, also: tuple[str, ...] = (), **measured: Any) -> None:
    """Write `name`.json into RESULTS and say so. `also`: further packages whose versions matter."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    result = {
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "bf16": bf16_units(),
            "accelerator": accelerator,
        },
        "versions": environment.versions() | {package: metadata.version(package) for package in also},
        "commit": commit(),
        **measured,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    target = RESULTS / f"{name}.json"
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(os.path.relpath(target))


def commit() -> str | None:
    """The commit that is checked out; None in a copy without its history."""
    told = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return told.stdout.strip() or None


def processor() -> str:
    """The name of the processor, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def bf16_units() -> str | None:
    """What an x86 has for bf16: tiles, products of pairs, or nothing."""
    words = cpu_flags().split()
    units = {"amx_bf16": "tiles", "avx512_bf16": "pairs"}
    return next((name for word, name in units.items() if word in words), None)
