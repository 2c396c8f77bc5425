"""Trains the tiny recipe in several forms, merges each under every policy and dtype, and writes the certificates that
docs/merging.md quotes to benchmarks/results/merge.json, with machine, versions, commit and commands.

    .venv/bin/python -m benchmarks.merge
"""

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.shared.record import ROOT, write_result

SHORT = ["train.max_steps=30", "eval.generate_rows=0"]
ARMS = {
    "nf4": [],  # make demo
    "lora": ["strategy=lora"],
    "nf4, 30 steps": SHORT,
    "nf4 without double quantization, 30 steps": ["quantize={kind: nf4, double_quant: false}", *SHORT],
    "nf4, bf16, 30 steps": ["train.precision=bf16", *SHORT],
    "nf4, DoRA, 30 steps": ["adapter.dora=true", *SHORT],
    "int8, 30 steps": ["quantize=int8", *SHORT],
    "lora, bf16, 30 steps": ["strategy=lora", "train.precision=bf16", *SHORT],
    "rsLoRA, 30 steps": ["strategy=lora", "adapter.rslora=true", *SHORT],
    "DoRA, 30 steps": ["strategy=lora", "adapter.dora=true", *SHORT],
}
PROMPTS = 100


def merges(run: Path) -> dict[str, Any]:
    """The certificate of each policy and dtype of a run, passed or not."""
    from gemma_ft.build.place import place_of
    from gemma_ft.export.merge.certificate import BeyondLimit, certify
    from gemma_ft.export.merge.certified import DTYPES
    from gemma_ft.export.merge.merge import merge_to_folder

    place, found = place_of(run), {}
    quantized = place.contract is not None and place.contract.quantize is not None
    for policy in ("original", "dequantized") if quantized else ("original",):
        for name, dtype in DTYPES.items():
            try:
                facts = merge_to_folder(
                    place,
                    run / f"{policy}-{name}",
                    dtype=dtype,
                    policy=policy,
                    certify=partial(certify, prompts=PROMPTS),
                )
                found[f"{policy} {name}"] = facts.certificate
            except BeyondLimit as error:
                found[f"{policy} {name}"] = error.certificate
    return found


def main() -> None:
    """Measure every arm and write the result file."""
    from gemma_ft.system import environment

    environment.quiet_libraries()
    arms: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, overrides) in enumerate(ARMS.items()):
            command = ["gemma-ft", "train", "recipes/sft_tiny.yaml", *overrides]
            run = Path(folder) / str(number)
            python = [sys.executable, "-m", "gemma_ft", *command[1:], f"output_dir={run}"]
            subprocess.run(python, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            arms[name] = {"command": " ".join(command), "merges": merges(run)}
            print(name)
    write_result("merge", arms=arms)


if __name__ == "__main__":
    main()
