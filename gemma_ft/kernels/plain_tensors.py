"""Tensors whose memory a kernel may be given by address: plain ones, of a dtype that the kernels compute in."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling

DTYPES = (torch.float32, torch.bfloat16)  # what the kernels in C++ and in Triton compute in
PLAIN = (Tensor, torch.nn.Parameter)  # no subclass: its memory may be elsewhere, or not be
CPU = torch.device("cpu")


def are_plain(first: Tensor, *others: Tensor | None, device: torch.device = CPU) -> bool:
    """Whether tensors are real ones on one device, all of one dtype, and nobody watches; asked for every operation of
    every token.
    """
    dtype = first.dtype
    for one in (first, *others):
        if one is not None and (type(one) not in PLAIN or one.dtype != dtype or one.device != device):
            return False
    return not _traced()


def _traced() -> bool:
    """Whether torch watches what is computed (compile, trace, functorch, a dispatch mode): it would not see an address
    being written to.
    """
    return (
        is_compiling()
        or _get_tracing_state() is not None
        or _len_torch_dispatch_stack() > 0
        or peek_interpreter_stack() is not None
    )
