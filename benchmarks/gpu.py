"""What CUDA gives: matrix products, attention, the head, training steps, the longest row, decoding; ours and others.

    python -m benchmarks.gpu                          parts in order, as many as fit --minutes, without those that
                                                      have a result file already
    python -m benchmarks.gpu PART ...                 parts by name
    python -m benchmarks.gpu --list
    python -m benchmarks.gpu --dry-run [PART ...]     one part of each kind with tiny shapes on the CPU; writes nothing
    python -m benchmarks.gpu --python unsloth=/path/to/python PART ...      an arm in an environment of its own

Each part writes gpu_PART.json. Weights are random at a realistic scale, from configs alone: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_decode import decode
from benchmarks.gpu_kernels import attention, gemm, head
from benchmarks.gpu_setup import MODELS, Setup
from benchmarks.gpu_train import longest, train
from benchmarks.shared.record import RESULTS, write_result

Part = Callable[[Setup], dict[str, Any]]
TOKENS, LAYOUTS, KINDS = (2048, 8192, 512, 4096), ("packed", "natural"), ("lora", "qlora")


def parts() -> dict[str, tuple[Part, int]]:
    """name: what measures it, and the seconds that it is expected to take; what matters most comes first."""
    found: dict[str, tuple[Part, int]] = {"gemm": (gemm, 40), "attention": (attention, 150), "head": (head, 40)}
    order = ("gemma-2-2b", "gemma-2-9b", "gemma-2b")
    for tokens in TOKENS:
        for layout in LAYOUTS:
            for model in order:
                for kind in KINDS:
                    line = partial(train, model=model, kind=kind, tokens=tokens, layout=layout)
                    found[f"train:{model}:{kind}:{tokens}:{layout}"] = (line, 400 if "9b" in model else 240)
        if tokens == TOKENS[0]:  # before the rest of the grid
            for model in order:
                found |= {
                    f"decode:{model}:{kind}": (partial(decode, model=model, kind=kind), 120) for kind in ("bf16", "nf4")
                }
            for limit in (24, 48):
                line = partial(longest, model="gemma-2-2b", kind="qlora", limit_gib=limit)
                found[f"longest:gemma-2-2b:qlora:{limit}"] = (line, 200)
    assert set(order) == set(MODELS)
    return found


# what a dry run takes of them: one of each kind, in both families and layouts
DRY = ("gemm", "attention", "head", "train:gemma-2-2b:lora:2048:packed", "train:gemma-2b:qlora:512:natural",
       "decode:gemma-2-2b:bf16", "decode:gemma-2b:nf4", "longest:gemma-2-2b:qlora:24")  # fmt: skip


def file_of(part: str) -> str:
    return "gpu_" + re.sub(r"[^\w.-]", "_", part)


def chosen(names: list[str], setup: Setup) -> list[str]:
    """Parts by name or by the beginning of one; without names those that were not measured yet."""
    known = parts()
    if not names and setup.dry:
        return list(DRY)
    if not names:
        return [name for name in known if not (RESULTS / f"{file_of(name)}.json").exists()]
    unknown = [one for one in names if not any(name == one or name.startswith(one + ":") for name in known)]
    if unknown:
        raise SystemExit(f"{unknown[0]}: no such part; --list names them")
    return [name for name in known if any(name == one or name.startswith(one + ":") for one in names)]


def release() -> None:
    """Leave the device's memory to the processes of the next part."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def arguments(given: list[str]) -> argparse.Namespace:
    reader = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    reader.add_argument("parts", nargs="*", metavar="PART")
    reader.add_argument("--list", action="store_true", help="name the parts")
    reader.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU; nothing is written")
    reader.add_argument("--minutes", type=float, default=9.0, help="begin no part that would end later (default: 9)")
    reader.add_argument("--python", action="append", default=[], metavar="ARM=PATH", help="the interpreter of an arm")
    return reader.parse_args(given)


def main(given: list[str]) -> int:
    """Measure; 2 on a machine without CUDA."""
    asked = arguments(given)
    if asked.list:
        print("\n".join(f"{name}  about {seconds} s" for name, (_, seconds) in parts().items()))
        return 0
    if not asked.dry_run and not torch.cuda.is_available():
        print("benchmarks.gpu: there is no CUDA device here; --dry-run tries the code on the CPU", file=sys.stderr)
        return 2
    pythons = {arm: Path(path) for arm, _, path in (one.partition("=") for one in asked.python)}
    setup, begun = Setup(dry=asked.dry_run, pythons=pythons), time.perf_counter()
    for name in chosen(asked.parts, setup):
        part, expected = parts()[name]
        if not setup.dry and time.perf_counter() - begun + expected > 60 * asked.minutes:
            print(f"{name}: left for another command, it takes about {expected} s", flush=True)
            continue
        started = time.perf_counter()
        found = part(setup)
        seconds = time.perf_counter() - started
        print(f"{name}: {seconds:.0f} s", flush=True)
        release()
        if not setup.dry:
            command = f"python -m benchmarks.gpu {name}"
            write_result(file_of(name), command=command, seconds=round(seconds, 1), measured=found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
