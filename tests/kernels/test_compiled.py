"""The Triton kernels compile for GPUs that are not here, keep what they compute in registers, and fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SHARED = 99 * 1024  # bytes that a block may have on the smallest of the cards served
SCRIPT = """
import json
from benchmarks import compiled
found = {}
for numbers, capability in (("bf16", 90), ("float32", 80)):
    for kernel in compiled.kernels(compiled.NUMBERS[numbers]):
        found[f"{kernel.name}, {numbers}, sm_{capability}"] = compiled.compiled(kernel, capability)
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_no_kernel_spills(tmp_path: Path) -> None:
    """In a process of its own: where the interpreter stands in for a GPU, nothing compiles."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) > 35
    for kernel, taken in found.items():
        assert taken["spills"] == 0, kernel
        assert 0 < taken["registers"] < 255, kernel
        assert taken["shared"] <= SHARED, kernel
