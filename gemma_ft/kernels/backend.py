"""Which implementation runs for an operation, and why: one table, which the operations, a run's `kernels` line and the
tests read. What is chosen before it by shape stays with the callers: a model's attention backend (model/attention.py),
few rows or many of a linear layer (model/linear.py, adapters/frozen_linear.py), the dtype of a product (matmul.py).

An operation is a file of this folder: what it computes, in plain torch, and its autograd. The table names what else
computes it, from the fastest to plain torch, which takes whatever it is given. A module that imports Triton is named
and not imported: it is loaded where it is first used, on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from gemma_ft.kernels import cpp_backend, flex_attention, matmul
from gemma_ft.kernels.plain_tensors import DTYPES
from gemma_ft.kernels.triton import triton_backend as triton

PLAIN_TORCH = "plain torch"


class Runs(Protocol):
    """What knows whether a kind of implementation runs: a module of this folder, for one."""

    @property
    def serves(self) -> Callable[..., bool]:
        """Whether it takes these tensors, as they are."""

    def verdict(self, device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> tuple[bool, str]:
        """Whether it runs on such a device in such a dtype, and why, in words for the user."""


class _Everywhere:
    """Plain torch."""

    def serves(self, *_: Tensor | None) -> bool:
        return True

    def verdict(self, device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> tuple[bool, str]:
        return True, PLAIN_TORCH


class _OnCPU(_Everywhere):
    """Plain torch whose order of operations suits a CPU."""

    def serves(self, *tensors: Tensor | None) -> bool:
        return tensors[0] is not None and tensors[0].is_cpu


@dataclass(frozen=True)
class Backend:
    """A kind of implementation. `device`: the type of device that it is for ("": any)."""

    name: str
    device: str
    runs: Runs


TRITON = Backend("triton", "cuda", triton)
FLEX = Backend("flex", "cuda", flex_attention)
CPP = Backend("cpp", "cpu", cpp_backend)
FLOAT32 = Backend("float32", "cpu", matmul)
CPU_TORCH = Backend("cpu", "cpu", _OnCPU())
TORCH = Backend("torch", "", _Everywhere())


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation: by the `functions` of `module`, forwards first, then backwards where the two are
    apart, and a weight's gradient where it has its own. `dtypes`: of what is computed (empty: any). `takes`: a function
    of the module that is asked about shapes and layouts ("": all are taken).
    """

    operation: str
    backend: Backend
    module: str
    functions: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = DTYPES
    takes: str = field(default="", kw_only=True)
    # the backend's own, copied here because every operation asks for them; the one called "torch" is the reference
    name: str = field(init=False)
    runs: Runs = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.backend.name)
        object.__setattr__(self, "runs", self.backend.runs)

    @cached_property
    def loaded(self) -> ModuleType:
        """Its module, imported now."""
        return triton.load(self.module)

    @property
    def run(self) -> Any:
        """The function that computes it; those that write into what they are given say so."""
        return getattr(self.loaded, self.functions[0])

    @property
    def backward(self) -> Any:
        """The function that computes its gradients."""
        return getattr(self.loaded, self.functions[1])

    @property
    def weight_gradient(self) -> Any:
        """The function that computes the gradient of its weight; None where there is none."""
        return getattr(self.loaded, self.functions[2]) if len(self.functions) > 2 else None

    def serves(self, *tensors: Tensor | None) -> bool:
        """Whether it takes these tensors, whatever their shapes; the first is one."""
        return self.runs.serves(*tensors)

    def accepts(self, *given: Any) -> bool:
        """Whether it takes what it `serves` in these shapes and layouts."""
        return not self.takes or bool(getattr(self.loaded, self.takes)(*given))


_CPP = "gemma_ft.kernels.cpp_operations"
_BF16 = (torch.bfloat16,)
_ALL = (
    Implementation("rms_norm", TRITON, "gemma_ft.kernels.triton.rms_norm", ("forward", "backward")),
    Implementation("rms_norm", CPP, _CPP, ("rms_norm", "rms_norm_backward", "rms_norm_weight_gradient")),
    Implementation("rms_norm", TORCH, "gemma_ft.kernels.rms_norm", ("rms_norm_reference",), ()),
    Implementation("rotary", TRITON, "gemma_ft.kernels.triton.rotary", ("turn",)),
    Implementation("rotary", CPP, _CPP, ("rotate",)),
    Implementation("rotary", TORCH, "gemma_ft.kernels.rotary", ("rotate_reference",), ()),
    Implementation("geglu", TRITON, "gemma_ft.kernels.triton.geglu", ("forward", "backward")),
    Implementation("geglu", CPP, _CPP, ("geglu", "geglu_backward")),
    Implementation("geglu", TORCH, "gemma_ft.kernels.geglu", ("geglu_reference",), ()),
    Implementation("cross_entropy", TRITON, "gemma_ft.kernels.triton.cross_entropy", ("rows",)),
    Implementation("cross_entropy", CPP, _CPP, ("fused_cross_entropy",)),
    Implementation("cross_entropy", TORCH, "gemma_ft.kernels.cross_entropy", ("fused_cross_entropy_reference",), ()),
    # a sequence's attention, and within it what a block's scores become between two products
    Implementation("attention", FLEX, "gemma_ft.kernels.flex_attention", ("flex_attention",)),
    Implementation("attention", CPU_TORCH, "gemma_ft.kernels.blockwise_attention", ("blockwise_attention",), ()),
    Implementation("attention", TORCH, "gemma_ft.kernels.attention", ("eager_attention",), ()),
    Implementation("attention_block", CPP, _CPP, ("block_weights", "block_gradients")),
    Implementation(
        "attention_block", TORCH, "gemma_ft.kernels.blockwise_attention", ("block_weights", "block_gradients"), ()
    ),
    Implementation(
        "decode_attention",
        TRITON,
        "gemma_ft.kernels.triton.decode_attention",
        ("decode_attention",),
        takes="serves_decode_attention",
    ),
    Implementation(
        "decode_attention", CPU_TORCH, "gemma_ft.kernels.decode_attention", ("decode_attention_reference",), ()
    ),
    Implementation("decode_attention", TORCH, "gemma_ft.kernels.attention", ("eager_attention",), ()),
    Implementation("nf4", TRITON, "gemma_ft.kernels.triton.nf4", ("dequantize",), takes="takes"),
    Implementation("nf4", CPP, _CPP, ("dequantize_nf4",), takes="takes_nf4"),
    Implementation("nf4", TORCH, "gemma_ft.kernels.nf4", ("dequantize_nf4_reference",), ()),
    Implementation("nf4_gemv", TRITON, "gemma_ft.kernels.triton.gemv_nf4", ("gemv_nf4",), takes="takes"),
    Implementation("nf4_gemv", CPP, _CPP, ("gemv_nf4",), _BF16, takes="takes_gemv_nf4"),
    Implementation("nf4_gemv", TORCH, "gemma_ft.kernels.nf4", ("dequantized_product",), ()),
    Implementation("gemv", CPP, _CPP, ("gemv",)),
    Implementation("gemv", TORCH, "gemma_ft.kernels.gemv", ("weight_first",), ()),
    Implementation("lora_gemv", TRITON, "gemma_ft.kernels.triton.gemv_lora", ("add_lora",)),
    Implementation("lora_gemv", TORCH, "gemma_ft.kernels.add_lora", ("add_lora_reference",), ()),
    # all layers for one token; in torch the model runs them one by one, each out of the operations above
    Implementation("fused_decode", CPP, "gemma_ft.kernels.fused_decode", ("decode",)),
    Implementation("fused_decode", TORCH, "", (), ()),
    Implementation("optimizer_step", CPP, _CPP, ("optimizer_step",)),
    Implementation("optimizer_step", TORCH, "gemma_ft.kernels.optimizer_step", ("optimizer_step_reference",), ()),
    Implementation("matmul", FLOAT32, "gemma_ft.kernels.matmul", ("widened", "widened_transposed"), _BF16),
    Implementation("matmul", TORCH, "torch", ("matmul",), ()),
)
OPERATIONS: dict[str, tuple[Implementation, ...]] = {
    operation: tuple(one for one in _ALL if one.operation == operation)
    for operation in dict.fromkeys(one.operation for one in _ALL)
}


def implementation_of(
    operation: str, *tensors: Tensor | None, fits: bool = True, given: tuple[Any, ...] = ()
) -> Implementation:
    """What computes an operation of these tensors, the first of which is one: the first of its implementations that
    takes them; the reference where they do not `fit` what the others promise.

    `given`: the arguments of `accepts`, which looks at shapes and layouts (default: the tensors).
    """
    found = OPERATIONS[operation]
    if fits:
        for one in found:
            if one.runs.serves(*tensors) and (not one.takes or one.accepts(*(given or tensors))):
                return one
    return found[-1]


@dataclass(frozen=True)
class Choice:
    """What runs for an operation on a device in a dtype, and why, in words for the user."""

    implementation: Implementation
    reason: str


def choice_of(operation: str, device: torch.device, dtype: torch.dtype, *, head_dim: int | None = None) -> Choice:
    """What `implementation_of` finds for plain tensors of this dtype on a device. `head_dim`: of attention's."""
    against = ""
    for one in OPERATIONS[operation]:
        if one.backend.device not in ("", device.type) or (one.dtypes and dtype not in one.dtypes):
            continue
        runs, why = one.runs.verdict(device, dtype, head_dim)
        if runs:
            return Choice(one, against or why)
        against = against or why
    raise AssertionError(f"{operation} has no reference")


def what_runs(device: torch.device, dtype: torch.dtype, *, head_dim: int | None = None) -> list[Choice]:
    """For every operation what runs on a device in a dtype, and why."""
    return [choice_of(operation, device, dtype, head_dim=head_dim) for operation in OPERATIONS]


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """What runs there, or why nothing faster does, in one line for the user; "" where plain torch is all there is."""
    return "; ".join(dict.fromkeys(one.reason for one in what_runs(device, dtype) if one.reason != PLAIN_TORCH))
