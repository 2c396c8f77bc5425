"""Row operations in C++ (the folder cpp) for CPUs: built where they run, when they are first needed, and kept in the
user's cache. Nothing needs them: without a compiler the plain-torch references run, and a run says so.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_ft.kernels.plain_tensors import DTYPES, are_plain
from gemma_ft.system import environment
from gemma_ft.system.hardware import cpu_flags

SOURCE = Path(__file__).with_name("cpp") / "ops.cpp"
WIDE = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
FLAGS = ("-std=c++20", "-O3", "-march=native", *WIDE, "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared",
         "-fPIC")  # fmt: skip
SECONDS = 120  # a compiler that takes longer hangs
P, I64, F32, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
PARAMETERS: dict[str, tuple[Any, ...]] = {  # without the last, the number of threads
    "rms_norm": (P, P, P, P, P, I64, I64, F32),
    "rms_norm_backward": (P, P, P, P, P, I64, I64),
    "rms_norm_weight_gradient": (P, P, P, P, I64, I64),
    "rotate": (P, P, P, P, I64, I64, I64, I64, P, P, I64, F32),
    "geglu": (P, P, P, I64),
    "geglu_backward": (P, P, P, P, P, I64),
    "attend": (P, P, P, I64, I64, I64, I64, F32, F32),
    "attend_backward": (P, P, P, P, I64, I64, I64, I64, F32, F32),
    "fused_cross_entropy": (P, P, P, P, P, P, I64, I64, F32, INT),
    "nf4": (P, P, P, P, P, F32, P, P, I64, I64, I64),
    "gemv": (P, P, P, I64, I64, I64),
    "gemv_nf4": (P, P, P, P, P, F32, P, P, P, I64, I64, I64, I64, I64),
    "decode": (P, P, P, P),
    "adamw_8bit": (P, P, P, P, P, P, P, P, P, P, P, I64),
    "lion_8bit": (P, P, P, P, P, P, P, I64),
}
SUFFIXES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}


@dataclass(frozen=True)
class Operations:
    """The operations that were built, or why there are none, in words for the user."""

    functions: dict[str, Any]
    reason: str


@cache
def operations() -> Operations:
    """Built and opened once in a process; a later process finds them built."""
    if not environment.own_kernels_wanted():
        return Operations({}, "plain torch and PEFT, as GEMMA_FT_KERNELS=off asks")
    compiler = environment.compiler()
    if compiler is None:
        return Operations({}, "plain torch: no C++ compiler; with g++ installed steps are faster")
    name = Path(compiler[0]).name
    try:
        library = ctypes.CDLL(str(_built(compiler)))
        return Operations(_functions(library), f"C++, built with {name} for this processor")
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        return Operations({}, f"plain torch: {name} could not build the C++ ones ({_why(error)})")


def serves(first: Tensor, *others: Tensor | None) -> bool:
    """Whether the C++ operations take these tensors: plain ones of a dtype that they know."""
    return first.dtype in SUFFIXES and are_plain(first, *others) and bool(operations().functions)


def verdict(device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> tuple[bool, str]:
    """Whether they run on tensors of this dtype on the CPU, and why, in words for the user."""
    found = operations()
    return dtype in SUFFIXES and bool(found.functions), found.reason


def call(name: str, *arguments: Any, of: torch.dtype) -> None:
    """One operation on tensors of dtype `of`; tensors are given by address, and must be laid out as it expects."""
    given = [one.data_ptr() if isinstance(one, Tensor) else one for one in arguments]
    operations().functions[f"{name}_{SUFFIXES[of]}"](*given, torch.get_num_threads())


def _functions(library: ctypes.CDLL) -> dict[str, Any]:
    found = {}
    for name, parameters in PARAMETERS.items():
        for suffix in SUFFIXES.values():
            function = found[f"{name}_{suffix}"] = getattr(library, f"{name}_{suffix}")
            function.argtypes, function.restype = (*parameters, INT), None
    return found


def _built(compiler: list[str]) -> Path:
    """The shared library for this source, compiler and processor. Raises: OSError, SubprocessError."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=SECONDS).stdout
    sources = (one.read_bytes() for one in sorted(SOURCE.parent.iterdir()) if one.suffix in (".h", ".cpp"))
    named = (*sources, version, " ".join([*compiler, *FLAGS, platform.machine(), cpu_flags()]).encode())
    key = hashlib.sha256(b"\0".join(hashlib.sha256(one).digest() for one in named)).hexdigest()[:16]
    folder = environment.cache_folder() / "kernels"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not all(_ours(place) for place in (folder, folder.parent)):
        raise OSError(f"{folder} can be written by others")  # what lies there would be run
    library, seal = folder / f"cpu_ops-{key}.so", folder / f"cpu_ops-{key}.sha256"
    if not _whole(library, seal):  # a damaged library may end the process that opens it
        _build(compiler, library, seal)
    return library


def _build(compiler: list[str], library: Path, seal: Path) -> None:
    """Compile, and put the library and its hash into their places, each whole: ranks build at the same time."""
    with tempfile.TemporaryDirectory(dir=library.parent) as place:
        draft, told = Path(place) / library.name, Path(place) / seal.name
        build = [*compiler, *FLAGS, str(SOURCE), "-o", str(draft)]
        subprocess.run(build, capture_output=True, check=True, timeout=SECONDS)
        told.write_text(hashlib.sha256(draft.read_bytes()).hexdigest())
        for one, target in ((draft, library), (told, seal)):
            with one.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(one, target)


def _whole(library: Path, seal: Path) -> bool:
    try:
        return hashlib.sha256(library.read_bytes()).hexdigest() == seal.read_text()
    except (OSError, ValueError):
        return False


def _ours(place: Path) -> bool:
    """Whether nobody but this user (and root) can put files into a folder; a group that has the user's name is theirs
    alone.
    """
    if not hasattr(os, "getuid"):
        return True
    import grp
    import pwd

    known = place.stat()
    try:
        alone = grp.getgrgid(known.st_gid).gr_name == pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        alone = False
    return known.st_uid in (os.getuid(), 0) and not known.st_mode & (0o002 if alone else 0o022)


def _why(error: Exception) -> str:
    said = getattr(error, "stderr", None) or str(error).encode()
    return said.decode(errors="replace").strip().splitlines()[0][:120] if said.strip() else type(error).__name__
