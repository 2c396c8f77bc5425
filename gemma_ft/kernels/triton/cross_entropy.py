"""The head's loss in Triton: a program for each row of logits, which become their gradient in place.

Letters: M labelled rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma_ft.kernels.triton.activations import tanh

BLOCK, WARPS = 4096, 8


@triton.jit
def _rows(
    logits, targets, weights, losses, correct, entropies, size, cap,
    CAPS: tl.constexpr, WEIGHS: tl.constexpr, GRADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    io = logits + row.to(tl.int64) * size
    target = tl.load(targets + row)
    top, total, below, best, said = float("-inf"), 0.0, 0.0, 0, 0.0
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        bent = tl.load(io + at, mask=at < size, other=0.0).to(tl.float32)
        if CAPS:
            bent = cap * tanh(bent / cap)
        bent = tl.where(at < size, bent, float("-inf"))
        highest = tl.max(bent, axis=0)
        best = tl.where(highest > top, start + tl.argmax(bent, axis=0), best)
        new = tl.maximum(top, highest)
        fades, shares = tl.exp(top - new), tl.exp(bent - new)
        below = (below + tl.where(total > 0, top - new, 0.0) * total) * fades
        below += tl.sum(shares * tl.where(at < size, bent - new, 0.0), axis=0)
        total = total * fades + tl.sum(shares, axis=0)
        top = new
        said += tl.sum(tl.where(at == target, bent, 0.0), axis=0)  # not read by itself: its place is written over below
    known = (target >= 0) & (target < size)  # a label that is none makes the loss NaN
    tl.store(losses + row, tl.where(known, tl.log(total) + top - said, float("nan")))
    tl.store(correct + row, best == target)
    tl.store(entropies + row, tl.log(total) - below / total)
    if GRADS:
        times = 1.0
        if WEIGHS:
            times = tl.load(weights + row)
        for start in range(0, size, BLOCK):
            at = start + tl.arange(0, BLOCK)
            bent = tl.load(io + at, mask=at < size, other=0.0).to(tl.float32)
            slope = 1.0
            if CAPS:
                t = tanh(bent / cap)
                bent, slope = cap * t, 1.0 - t * t
            grad = (tl.exp(bent - top) / total - tl.where(at == target, 1.0, 0.0)) * slope * times
            tl.store(io + at, grad.to(logits.dtype.element_ty), mask=at < size)


def rows(
    logits: Tensor, targets: Tensor, weights: Tensor | None, losses: Tensor, correct: Tensor, entropies: Tensor,
    cap: float | None, *, with_grad: bool,
) -> None:  # fmt: skip
    """Contiguous logits [M, V] and targets [M] -> losses and entropies [M] in float32, hits [M], and the gradient in
    place.
    """
    if len(logits):
        with torch.cuda.device_of(logits):
            _rows[(len(logits),)](
                logits, targets, targets if weights is None else weights, losses, correct, entropies, logits.shape[1],
                cap or 1.0, cap is not None, weights is not None, with_grad, BLOCK, num_warps=WARPS,
            )  # fmt: skip
