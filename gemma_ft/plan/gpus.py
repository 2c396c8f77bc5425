"""Sizes of GPUs, in words and in bytes."""

from __future__ import annotations

import re

from gemma_ft.errors import UserError

GIB = 2**30
LARGEST_BARE = 512  # a number alone that is larger is no count of GiB: 4090 is the name of a GPU, 24576 its MiB
USABLE = 0.9  # of a device's nominal size: the rest goes to driver, ECC and what an allocator cannot join
USABLE_CPU = 0.7  # of a machine's memory: the rest is the system's, and that of what else is open
# nominal GiB of common GPUs, and some that have so much
GPUS = {
    8: "RTX 4060, RTX 3070",
    12: "RTX 3060, RTX 4070",
    16: "T4, V100, RTX 4080",
    24: "RTX 3090, RTX 4090, A10, L4",
    32: "RTX 5090, V100",
    40: "A100",
    48: "L40S, RTX A6000",
    80: "A100, H100",
    94: "H100 NVL",
    141: "H200",
}


def gpu_bytes(text: str) -> int:
    """The bytes of `24GiB`, `24 GB`, `24` (GiB: what is sold as GB of a GPU are GiB).

    Raises: UserError for what is no size, among them the name of a GPU: `4090`, `A100`.
    """
    size = _bytes(text)
    if size is None:
        raise UserError(f"--gpu: {text!r} is no size of a GPU; {_cure(text)}")
    return size


def cpu_bytes(text: str) -> int:
    """The same of a machine's memory. Raises: UserError for what is no size."""
    size = _bytes(text)
    if size is None:
        raise UserError(f"--cpu: {text!r} is no size of memory; give it as 8GiB")
    return size


def _bytes(text: str) -> int | None:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gi?b?)?", text.strip(), re.IGNORECASE)
    size = float(match.group(1)) if match else 0.0
    fits = match is not None and 1 <= size <= (10_000 if match.group(2) else LARGEST_BARE)
    return int(size * GIB) if fits else None


def _cure(text: str) -> str:
    """What to give instead: the sizes of the GPU that a text names, where it is one of those that are known."""
    asked = _letters(text)
    named = [(gpu, size) for size, gpus in GPUS.items() for gpu in gpus.split(", ") if _letters(gpu) == asked]
    if not named:
        return "give it as 24GiB"
    return f"the {named[0][0]} has {' or '.join(f'{size}GiB' for _, size in named)}"


def _letters(name: str) -> str:
    """A GPU's name as people spell it: `RTX 4090`, `rtx4090`, `4090`."""
    return re.sub(r"[^a-z0-9]|rtx", "", name.lower())


def smallest_gpu(needed: int) -> int | None:
    """Nominal GiB of the smallest of GPUS that has room for so many bytes; None where none has."""
    return next((size for size in GPUS if needed <= USABLE * size * GIB), None)
