"""The operations in C++ as functions of tensors, with the faces of those in Triton: results are written into what they
are given. All tensors are on the CPU, of one dtype where nothing else is said, and contiguous.

Letters: M rows, D the size of a row, I input and O output features, V vocabulary, H head dim.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma_ft.kernels import cpp_backend
from gemma_ft.kernels.gemv import are_few, fits
from gemma_ft.kernels.optimizer_step import MOMENTS, nearest_codes, numbers_of

if TYPE_CHECKING:
    from gemma_ft.kernels.blockwise_attention import Block
    from gemma_ft.kernels.optimizer_step import Rates, Rule


def rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None, out: Tensor, rstd: Tensor, eps: float) -> None:
    """x [.., D], weight [D] in any dtype -> out [.., D] and 1 / rms [..] in float32."""
    gain = 1.0 + weight.float()
    cpp_backend.call("rms_norm", x, gain, residual, out, rstd, rstd.numel(), x.shape[-1], eps, of=x.dtype)


def rms_norm_backward(upstream: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, grad: Tensor) -> None:
    """The gradient of x in `grad`."""
    gain = 1.0 + weight.float()
    cpp_backend.call("rms_norm_backward", upstream, x, gain, rstd, grad, rstd.numel(), x.shape[-1], of=x.dtype)


def rms_norm_weight_gradient(upstream: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """The gradient of the weight [D], float32."""
    grad = torch.empty(x.shape[-1])
    cpp_backend.call("rms_norm_weight_gradient", upstream, x, rstd, grad, rstd.numel(), x.shape[-1], of=x.dtype)
    return grad


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, sign: float) -> None:
    """`out` [B, heads, T, H], filled with x turned by angles [B or 1, 1, T, H] (sign -1: turned back); of x and `out`
    the last dimension alone need be contiguous.
    """
    of_row = 0 if cos.shape[0] == 1 else cos.stride(0)
    strides = [(ctypes.c_int64 * 3)(*one.stride()[:3]) for one in (x, out)]
    cpp_backend.call("rotate", x, cos, sin, out, *x.shape, *strides, of_row, sign, of=x.dtype)


def geglu(gate: Tensor, up: Tensor, out: Tensor) -> None:
    """gelu_tanh(gate) * up in `out`."""
    cpp_backend.call("geglu", gate, up, out, out.numel(), of=gate.dtype)


def geglu_backward(upstream: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor) -> None:
    """Both gradients."""
    cpp_backend.call("geglu_backward", upstream, gate, up, grad_gate, grad_up, gate.numel(), of=gate.dtype)


def fused_cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor | None, losses: Tensor, correct: Tensor, entropies: Tensor,
    cap: float | None, *, with_grad: bool,
) -> None:  # fmt: skip
    """Logits [M, V], int64 targets [M], float32 weights [M] -> losses and entropies [M] in float32, hits [M], and
    the gradient in the logits' place. Raises: IndexError for a target that is no token.
    """
    if len(targets) != len(logits) or (len(targets) and not 0 <= targets.min() <= targets.max() < logits.shape[1]):
        raise IndexError(f"a label is out of bounds of {logits.shape[1]} tokens, or there is not one for each row")
    sizes = (*logits.shape, cap or 0.0, int(with_grad))
    cpp_backend.call(
        "fused_cross_entropy", logits, targets, weights, losses, correct, entropies, *sizes, of=logits.dtype
    )


def block_weights(block: Block, raw: Tensor) -> tuple[Tensor, Tensor]:
    """See `blockwise_attention.block_weights`; the weights take the scores' place."""
    log_sum = torch.empty(block.heads, block.shape[2])
    cpp_backend.call("attend", raw, block.low, log_sum, *_sizes(block, raw), of=raw.dtype)
    return raw, log_sum


def block_gradients(block: Block, raw: Tensor, grad: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor]:
    """See `blockwise_attention.block_gradients`; both results take the places of what was given."""
    cpp_backend.call("attend_backward", raw, grad, block.low, log_sum.contiguous(), *_sizes(block, raw), of=raw.dtype)
    return raw, grad


def _sizes(block: Block, raw: Tensor) -> tuple[int, int, int, int, float, float]:
    """As cpp/ops.cpp takes them; a cap of 0 is none."""
    return block.heads, block.shape[2], raw.shape[-1], block.last, block.scale, block.softcap or 0.0


def gemv(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, I], in any layout, and weight [O, I] -> x weightᵀ [M, O]."""
    rows, (outputs, inputs) = len(x), weight.shape
    out = torch.empty(rows, outputs, dtype=x.dtype)
    cpp_backend.call("gemv", weight, x.contiguous(), out, rows, outputs, inputs, of=x.dtype)
    return out


def dequantize_nf4(packed: Tensor, state: Any, out: Tensor | None = None) -> Tensor:
    """See `nf4.dequantize_nf4`."""
    weight = torch.empty(state.shape, dtype=state.dtype) if out is None else out
    scales, blocks = nf4_scales(state)
    cpp_backend.call("nf4", packed, *scales, weight, weight.numel(), *blocks, of=state.dtype)
    return weight


def takes_nf4(packed: Tensor, state: Any) -> bool:
    """Whether `dequantize_nf4` reads this weight, whose form is the usual one."""
    whole: bool = state.blocksize % 32 == 0
    return whole


def gemv_nf4(x: Tensor, packed: Tensor, state: Any) -> Tensor:
    """x [M, I], in any layout, times the weight transposed -> [M, O]; the weight is unpacked within the product."""
    rows, (scales, blocks) = len(x), nf4_scales(state)
    out = torch.empty(rows, state.shape[0], dtype=x.dtype)
    cpp_backend.call("gemv_nf4", packed, *scales, x.contiguous(), out, rows, *state.shape, *blocks, of=x.dtype)
    return out


def takes_gemv_nf4(x: Tensor, packed: Tensor, state: Any) -> bool:
    """Whether `gemv_nf4` takes these rows [M, I] and this weight, whose form is the usual one."""
    rows = len(x)
    return are_few(x, rows) and takes_nf4(packed, state) and fits(rows, state.shape, state.blocksize)


def optimizer_step(rule: Rule, parameter: Tensor, grad: Tensor, state: dict[str, Any], rates: Rates) -> None:
    """See `optimizer_step.optimizer_step_reference`."""
    moments: list[Tensor] = []
    for number in range(1, MOMENTS[rule] + 1):
        moments += [state[f"{kind}{number}"] for kind in ("state", "absmax", "qmap")] + [nearest_codes(number == 1)]
    numbers = torch.tensor(numbers_of(rule, state["step"], rates), dtype=torch.float32)
    name = {"adam": "adamw_8bit", "lion": "lion_8bit"}[rule]
    cpp_backend.call(name, parameter, grad, *moments, numbers, parameter.numel(), of=parameter.dtype)


def nf4_scales(state: Any) -> tuple[tuple[Any, ...], tuple[int, int]]:
    """How cpp/ops.cpp takes the scales and the sixteen numbers, and the sizes of the blocks."""
    if not state.nested:
        return (state.absmax, None, None, None, 0.0, state.code), (state.blocksize, 1)
    nested = state.state2
    scales = (None, state.absmax, nested.code, nested.absmax, float(state.offset), state.code)
    return scales, (state.blocksize, nested.blocksize)
