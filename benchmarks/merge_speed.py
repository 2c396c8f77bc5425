"""MB/s at which a LoRA adapter is merged, from a folder to a folder: ours (a tensor at a time), and PEFT's
merge_and_unload + save_pretrained, on the Gemma 2 of 100M parameters in bf16. Writes
benchmarks/results/merge_speed.json; benchmarks/merge.py is about how exact a merge is.

    .venv/bin/python -m benchmarks.merge_speed
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.shared.hundred_million import SHAPE, tokenizer, write_base
from benchmarks.shared.record import write_result
from benchmarks.shared.turns import QUICK, in_turns, paired

TURNS = 4


def prepare(folder: Path) -> None:
    """Base, tokenizer, and an adapter as if trained: fresh LoRA adds nothing."""
    write_base(folder)
    tokenizer().save_pretrained(str(folder / "base"))
    weights = folder / "adapter" / "adapter_model.safetensors"
    draw = torch.Generator().manual_seed(2)
    trained = {
        name: torch.randn(one.shape, generator=draw).mul_(0.02).to(one.dtype) if "lora_B" in name else one
        for name, one in load_file(weights).items()
    }
    save_file(trained, weights, metadata={"format": "pt"})


def ours(folder: Path, out: Path) -> None:
    from gemma_ft.build.place import place_of
    from gemma_ft.export.merge.merge import merge_to_folder

    merge_to_folder(place_of(folder / "base", folder / "adapter"), out, dtype=torch.bfloat16)


def peft(folder: Path, out: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(str(folder / "base"), dtype=torch.bfloat16)
    PeftModel.from_pretrained(base, str(folder / "adapter")).merge_and_unload().save_pretrained(str(out))


def timed(merge: Callable[[Path, Path], None], folder: Path, out: Path) -> float:
    """MB of weights written per second; the folder stays until the next turn."""
    shutil.rmtree(out, ignore_errors=True)
    begun = time.perf_counter()
    merge(folder, out)
    seconds = time.perf_counter() - begun
    return sum(one.stat().st_size for one in out.glob("*.safetensors")) / 1e6 / seconds


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor.float() for file in files for name, tensor in load_file(file).items()}


def difference(folder: Path, out: Path, other: Path) -> float:
    """The largest |difference| of a weight in two merged folders, over the largest |change| that the merge made."""
    one, two, base = (weights_in(place) for place in (out, other, folder / "base"))
    apart = max(float((one[name] - two[name]).abs().max()) for name in base)
    return apart / max(float((one[name] - base[name]).abs().max()) for name in base)


def main(turns: int = TURNS) -> None:
    """Measure in turns and write the result file."""
    from gemma_ft.system import environment

    environment.quiet_libraries()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder)
        arms = {name: partial(timed, run, folder, folder / name) for name, run in (("ours", ours), ("peft", peft))}
        for run in arms.values():  # imports
            run()
        found = in_turns(arms, turns)
        apart = difference(folder, folder / "ours", folder / "peft")
    speed = {name: round(statistics.median(ones), 1) for name, ones in found.items()}
    print(speed)
    write_result("merge_speed", also=("peft",), command="python -m benchmarks.merge_speed", shape=SHAPE, turns=turns,
                 megabytes_per_second=speed, ours_over=paired(found["ours"], found["peft"]),
                 largest_difference_over_largest_change=round(apart, 4))  # fmt: skip


if __name__ == "__main__":
    main(1 if QUICK in sys.argv else TURNS)
