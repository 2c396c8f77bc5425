"""Whether the Triton kernels of this folder run, and their modules, which import Triton: loaded when they are first
used. Nothing needs them: without Triton, or on a CPU, others do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from gemma_ft.kernels.plain_tensors import DTYPES, are_plain
from gemma_ft.system import environment

CAPABILITY = (8, 0)  # of NVIDIA cards: the first with bf16, and with what FlexAttention is compiled for


def serves(first: Tensor, *others: Tensor | None) -> bool:
    """Whether they take these tensors: plain ones on one GPU, of a dtype that they know."""
    return (
        first.is_cuda
        and first.dtype in DTYPES
        and are_plain(first, *others, device=first.device)
        and reason_against(first.device, first.dtype) is None
    )


def verdict(device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> tuple[bool, str]:
    """Whether they run on tensors of this dtype on a GPU, and why, in words for the user."""
    if dtype not in DTYPES:
        return False, f"plain torch: no kernel computes in {str(dtype).removeprefix('torch.')}"
    against = reason_against(device, dtype)
    return against is None, "Triton" if against is None else f"plain torch: {against}"


@cache
def load(module: str) -> ModuleType:
    """A module by its full name, imported when it is first asked for: the one place where a kernel's module is."""
    return import_module(module)


@cache
def reason_against(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why they do not run on a GPU, in words for the user; None: they do. One is tried, for Triton may be there without
    the compiler that it needs.
    """
    if not environment.own_kernels_wanted():
        return "as GEMMA_FT_KERNELS=off asks"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < CAPABILITY:
        return "this GPU has no bf16 of its own"

    def one() -> None:
        numbers = torch.zeros(64, dtype=dtype, device=device)
        load("gemma_ft.kernels.triton.geglu").forward(numbers, numbers, torch.empty_like(numbers))
        torch.cuda.synchronize(device)

    failed = tried(one)
    return None if failed is None else f"Triton does not run here ({failed})"


def tried(run: Callable[[], None]) -> str | None:
    """The last line of what a trial raised, None where it went well. In a thread of its own, which has no hooks, modes
    or autocast of whoever happens to ask first.

    Raises: torch.OutOfMemoryError, which says nothing about what is tried.
    """
    raised: list[Exception] = []

    def trial() -> None:
        try:
            run()
        except Exception as error:  # a compiler's, of no one kind
            raised.append(error)

    thread = threading.Thread(target=trial)
    thread.start()
    thread.join()
    if not raised:
        return None
    if isinstance(raised[0], torch.OutOfMemoryError):
        raise raised[0]
    return (str(raised[0]).strip().splitlines() or [type(raised[0]).__name__])[-1][:120]
