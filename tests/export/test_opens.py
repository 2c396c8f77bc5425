"""An export to GGUF opens each file that it reads once: counted by the interpreter, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_ft.build.contract import Contract

# An audit hook is told of every open(), and cannot be taken off again. What libraries in Rust open it does not see, nor
# the quick look that a command takes at a config.json before it imports anything.
SPY = """
import collections, json, os, pathlib, sys
from gemma_ft.export.export import ExportOptions, export_model

opened = collections.Counter()

def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        opened[os.path.abspath(os.fsdecode(arguments[0]))] += 1

sys.addaudithook(hook)
found = {}
for out in ("x.gguf", "x"):
    opened.clear()
    export_model(sys.argv[1], ExportOptions(to="gguf", out=pathlib.Path(sys.argv[2]) / out))
    found[out] = dict(opened)
with open(os.path.join(sys.argv[2], "opened.json"), "w") as file:
    json.dump(found, file)
"""
# Of safetensors the header, and all of it once more for the fingerprint that the contract is held to. transformers
# opens the two files of a tokenizer twice, and config.json after it was seen how the family's files name weights.
TWICE = {"config.json", "model.safetensors", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.slow  # a process of its own
def test_an_export_opens_each_input_file_once(finished_run: Path, tmp_path: Path) -> None:
    """To a file and to a folder."""
    adapter = finished_run / "adapter"
    contract = Contract.read(adapter)
    assert contract is not None
    base = Path(str(contract.base))
    subprocess.run([sys.executable, "-c", SPY, finished_run, tmp_path], check=True, capture_output=True)
    needed = {
        adapter / "adapter_config.json", adapter / "gemma_ft.json", adapter / "adapter_model.safetensors",
        adapter / "tokenizer.json", base / "config.json", base / "model.safetensors", finished_run / "recipe.yaml",
    }  # fmt: skip
    for out, opened in json.loads((tmp_path / "opened.json").read_text()).items():
        inputs = {Path(path): count for path, count in opened.items()}
        inputs = {path: count for path, count in inputs.items() if path.parent in (finished_run, adapter, base)}
        assert needed <= inputs.keys(), out
        assert {path.name: count for path, count in inputs.items() if count > 1} == dict.fromkeys(TWICE, 2), out
