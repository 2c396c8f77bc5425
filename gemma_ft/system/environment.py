"""What this process runs on: device, dtypes by name, memory, versions, quiet libraries. The only reader of
os.environ.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import logging
import os
import platform
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_ft.errors import UserError

if TYPE_CHECKING:
    import torch

CGroup = tuple[Path, str, str, str]
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")
V2 = ("memory.max", "memory.current", "inactive_file ")
BITSANDBYTES_CHATTER = ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions")  # loggers of no news
REPORTED_PACKAGES = ("gemma-ft", "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets")


def debug_enabled() -> bool:
    """Whether the user asked for tracebacks (GEMMA_FT_DEBUG=1)."""
    return os.environ.get("GEMMA_FT_DEBUG", "") not in ("", "0")


def own_kernels_wanted() -> bool:
    """Whether fast paths of ours may run for operations and layers of libraries: GEMMA_FT_KERNELS=off says no."""
    return os.environ.get("GEMMA_FT_KERNELS", "").lower() not in ("off", "0", "false")


def compiler() -> list[str] | None:
    """The command of a C++ compiler: CXX, which may have arguments, else the first of the usual names that is there."""
    for command in (shlex.split(os.environ.get("CXX", "")), ["g++"], ["c++"], ["clang++"]):
        if command and (found := shutil.which(command[0])):
            return [found, *command[1:]]
    return None


def dtype_by_name(name: str) -> torch.dtype:
    """The torch dtype of a recipe's `precision`: bf16 or float32."""
    import torch

    return {"bf16": torch.bfloat16, "float32": torch.float32}[name]


def default_device() -> torch.device:
    """The device a run uses: this rank's CUDA device where there is one, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", _number("LOCAL_RANK", 0))
    return torch.device("cpu")


def device_name() -> str:
    """What a run is computed on, for a reader: the GPU's name, or the CPU with the cores that are used."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name(default_device()))
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"


def from_environment(name: str) -> str | None:
    """The value of one environment variable that the user named (a key that belongs on no command line), or None."""
    return os.environ.get(name)


@dataclass(frozen=True)
class Launch:
    """How the launcher (accelerate launch, torchrun, or none) started this process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    fsdp: bool = False
    reshard_after_forward: bool = True
    offload: bool = False


# What an accelerate config may switch on that would change the numbers, or that is done otherwise here: variable, the
# values that ask for nothing, and where the choice belongs.
_ELSEWHERE = (
    ("ACCELERATE_MIXED_PRECISION", ("no",), "mixed_precision", "the recipe's train.precision decides; set it to 'no'"),
    ("ACCELERATE_DYNAMO_BACKEND", ("no",), "dynamo_backend", "compiling is not supported; leave it out"),
    ("ACCELERATE_USE_DEEPSPEED", ("false",), "deepspeed", "not supported; use FSDP version 2"),
    ("ACCELERATE_USE_MEGATRON_LM", ("false",), "megatron_lm", "not supported; use FSDP version 2"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", ("false",), "parallelism_config", "not supported; use FSDP version 2"),
    (
        "FSDP_ACTIVATION_CHECKPOINTING",
        ("false",),
        "fsdp_activation_checkpointing",
        "the recipe's train.gradient_checkpointing decides; set it to false",
    ),
)


def cache_folder() -> Path:
    """Where encoded rows are kept: GEMMA_FT_CACHE, else a folder of the user's cache; of one without a home (a number
    that a cluster made up) one among temporary files.
    """
    if named := os.environ.get("GEMMA_FT_CACHE"):
        return Path(os.path.expanduser(named))
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemma-ft"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"gemma-ft-{os.getuid()}"


def keep_compiled() -> None:
    """Have torch keep what it compiles with our other caches, where the next start of the machine finds it, and not
    among temporary files; whoever set the variable decides, and a folder that cannot be made changes nothing.
    """
    folder = cache_folder() / "compiled"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def processors() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_thread_for_tokens() -> None:
    """Have the tokenizer work in the calling thread alone: where there is a process for each core already."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def launched() -> Launch:
    """What the launcher says in the environment, in the words of an accelerate config; asked once by a process.

    From here on accelerate itself sees ranks and no FSDP: sharding is ours (train/fsdp.py says why), and it would
    wrap the model a second time.
    Raises: UserError for settings that would change the numbers, or are not supported.
    """
    for variable, harmless, key, cure in _ELSEWHERE:
        value = os.environ.get(variable, "").lower()
        if value not in ("", *harmless):
            raise UserError(f"accelerate config: {key}: {value}: {cure}")
    fsdp = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if fsdp:
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise UserError(f"accelerate config: fsdp_version: {version} is not supported; set it to 2")
    return Launch(
        rank=_number("RANK", 0),
        world_size=_number("WORLD_SIZE", 1),
        local_rank=_number("LOCAL_RANK", 0),
        local_world_size=_number("LOCAL_WORLD_SIZE", 1),
        fsdp=fsdp,
        reshard_after_forward=_flag("FSDP_RESHARD_AFTER_FORWARD", True),
        offload=_flag("FSDP_OFFLOAD_PARAMS", False),
    )


def hangup() -> tuple[signal.Signals, ...]:
    """SIGHUP, which a terminal that goes away sends; nothing where this process was started with it ignored, as nohup
    does: then it stays so.
    """
    return () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)


def pass_signals_on() -> None:
    """Have torch's launcher hand on to its ranks every signal that stops a run; by itself it leaves SIGUSR1 out."""
    numbers = (signal.SIGTERM, signal.SIGINT, *hangup(), signal.SIGQUIT, signal.SIGUSR1)
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", ",".join(number.name for number in numbers))


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default


def _flag(name: str, default: bool) -> bool:
    return os.environ.get(name, str(default)).lower() in ("true", "1")


def no_crash_reports() -> None:
    """W&B's crash reporter would open connections even when W&B is offline; whoever set the variable decides."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


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


def ranks_on_this_machine(ranks: int) -> int:
    """How many of so many ranks share this machine's memory."""
    return min(ranks, _number("LOCAL_WORLD_SIZE", ranks))


def give_memory_back() -> None:
    """Hand memory that was freed back to the system, where the C library is glibc: it keeps what large tensors took."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers, and the platform."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in REPORTED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def quiet_libraries() -> None:
    """Keep what libraries say to their own developers away from the user; called once, by the command line.

    Their progress bars would tear ours. bitsandbytes asks at import for a package that would bring its own downloads,
    and warns on every call that int8 multiplies in float16: our docs say so once. Faults still raise.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("bitsandbytes", "accelerate", "peft", "trl", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    quiet_bitsandbytes()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings(
        "ignore", category=UserWarning, module=r"(bitsandbytes|torch|transformers|peft|trl|accelerate)"
    )


def quiet_bitsandbytes() -> None:
    """Silence bitsandbytes' import-time request for `kernels` and its per-call int8 cast warning (both mere log
    lines).
    """
    for name in BITSANDBYTES_CHATTER:
        logging.getLogger(name).setLevel(logging.ERROR)
