"""What this process runs on: device, dtypes by name, kind of processor, memory. torch is imported where it is asked."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_ft.system.environment import local_rank

if TYPE_CHECKING:
    import torch

CGroup = tuple[Path, str, str, str]
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")
V2 = ("memory.max", "memory.current", "inactive_file ")


def dtype_by_name(name: str) -> torch.dtype:
    """The torch dtype of a recipe's `precision`: bf16 or float32."""
    import torch

    return {"bf16": torch.bfloat16, "float32": torch.float32}[name]


def default_device() -> torch.device:
    """The device a run uses: this rank's CUDA device where there is one, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def device_name() -> str:
    """What a run is computed on, for a reader: the GPU's name, or the CPU with the cores that are used."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name(default_device()))
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"


def processors() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory_bytes() -> int:
    """Most memory this process has held at once: CUDA's allocator where there is a GPU, else the resident set of the
    process.
    """
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_bytes() -> tuple[int, int]:
    """What this process holds now of the memory that it trains in, and what it could still take: of its GPU, where
    torch's allocator counts; else of the machine, where files that are mapped are not held.
    """
    import torch

    if torch.cuda.is_available():
        held, (free, _) = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()
        return held, int(free + torch.cuda.memory_reserved() - held)
    return _system_bytes("/proc/self/status", "RssAnon:") or 0, _free_ram()


def _free_ram() -> int:
    """What the system says is available without swapping, and no more than a container is allowed, where it is one."""
    free = _system_bytes("/proc/meminfo", "MemAvailable:")
    if free is None:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for group, limit_file, used_file, files_line in _control_groups():
        with contextlib.suppress(OSError, ValueError, StopIteration):  # "max": no limit
            limit, used = (int((group / name).read_text()) for name in (limit_file, used_file))
            lines = (group / "memory.stat").read_text().splitlines()
            files = int(next(line for line in lines if line.startswith(files_line)).split()[1])  # given up when asked
            free = min(free, limit - used + files)
    return max(free, 0)


def _control_groups(root: Path = Path("/sys/fs/cgroup"), told: Path = Path("/proc/self/cgroup")) -> Iterator[CGroup]:
    """The control groups of this process, each with its parents: their folder, and the names of limit, use and of what
    is given up when asked; of both versions, for a batch system limits a group further in.
    """
    with contextlib.suppress(OSError):
        for line in told.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            first, names = (root / "memory", V1) if controllers else (root, V2)
            inside = [part for part in path.split("/") if part not in ("", "..")]
            for depth in range(len(inside), -1, -1):
                yield first.joinpath(*inside[:depth]), *names


def _system_bytes(file: str, key: str) -> int | None:
    """A line in kB of one of the system's accounts, in bytes; None where there is none."""
    with contextlib.suppress(OSError):
        for line in Path(file).read_text(encoding="utf-8").splitlines():
            if line.startswith(key):
                return 1024 * int(line.split()[1])
    return None


def give_memory_back() -> None:
    """Hand memory that was freed back to the system, where the C library is glibc: it keeps what large tensors took."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def cpu_flags() -> str:
    """What the code and the paths that are best for this processor depend on, as Linux tells it: vendor and flags."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    told = (next((one for one in lines if one.startswith(name)), ":") for name in ("vendor_id", "flags", "Features"))
    return " ".join(one.partition(":")[2].strip() for one in told).strip()


def float32_is_faster(processor: str) -> bool:
    """Whether products of bf16 are faster as products of float32: on an x86 without tiles for them. `processor`: what
    `cpu_flags` says. AMD's with bf16 multiply pairs at the full rate; what is no x86 is left as it is.
    """
    words = processor.split()
    if "amx_bf16" in words or "sse2" not in words:
        return False
    return "avx512_bf16" not in words or "GenuineIntel" in words
