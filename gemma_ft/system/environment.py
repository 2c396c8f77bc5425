"""What the environment of this process says: our own variables, the launcher's, versions, quiet libraries. The only
reader of os.environ.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import shlex
import shutil
import signal
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

from gemma_ft.errors import UserError

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


# Accelerate settings that we refuse, because they would change the numbers or are done otherwise here: variable,
# allowed values, key in the file, cure.
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


HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"


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


def ask_for_huge_pages() -> None:
    """Have torch take what has 2 MiB and more in huge pages, where Linux gives them to who asks: a model that answers
    reads all of its weights for each token, and through far fewer pages. To be said before torch is imported, by
    processes that answer alone: training, whose memory comes and goes, takes more of it so. Whoever set the variable
    decides. Source: torch c10/core/impl/alloc_cpu.cpp.
    """
    os.environ.setdefault(HUGE_PAGES, "1")


def huge_pages() -> bool:
    """Whether torch takes memory in huge pages."""
    return sys.platform.startswith("linux") and os.environ.get(HUGE_PAGES) == "1"


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
        local_rank=local_rank(),
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


def local_rank() -> int:
    """Which of the ranks on this machine this process is."""
    return _number("LOCAL_RANK", 0)


def ranks_on_this_machine(ranks: int) -> int:
    """How many of so many ranks share this machine's memory."""
    return min(ranks, _number("LOCAL_WORLD_SIZE", ranks))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers, and the platform."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in REPORTED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def quiet_libraries(*, answering: bool = False) -> None:
    """Keep what libraries say to their own developers away from the user; called once, by the command line, before
    torch is imported. answering: a model is only asked by this process (`ask_for_huge_pages`).

    Their progress bars would tear ours. bitsandbytes asks at import for a package that would bring its own downloads,
    and warns on every call that int8 multiplies in float16: our docs say so once. Faults still raise.
    """
    if answering:
        ask_for_huge_pages()
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
