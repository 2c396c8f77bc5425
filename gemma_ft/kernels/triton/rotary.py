"""Rotary positions in Triton: a program for each token, over all of its heads.

Letters: B batch, T tokens, H head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _turn(
    x, cos, sin, out, heads, tokens, half, sign, x_b, x_head, x_t, out_b, out_head, out_t, angles_b,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    b, t = (tl.program_id(0) // tokens).to(tl.int64), (tl.program_id(0) % tokens).to(tl.int64)
    head, at = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (at < half)
    angle = b * angles_b + t * 2 * half + at
    c = tl.load(cos + angle, mask=at < half, other=0.0)
    s = tl.load(sin + angle, mask=at < half, other=0.0) * sign
    first = tl.load(x + b * x_b + head * x_head + t * x_t + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + b * x_b + head * x_head + t * x_t + half + at, mask=inside, other=0.0).to(tl.float32)
    to = out + b * out_b + head * out_head + t * out_t + at
    tl.store(to, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(to + half, (second * c + first * s).to(out.dtype.element_ty), mask=inside)


def turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, sign: float) -> None:
    """`out` [B, heads, T, H], filled with x turned by contiguous angles [B or 1, 1, T, H] (sign -1: turned back)."""
    batch, heads, tokens, width = x.shape
    of_row = 0 if cos.shape[0] == 1 else cos.stride(0)
    with torch.cuda.device_of(x):
        _turn[(batch * tokens,)](
            x, cos, sin, out, heads, tokens, width // 2, sign, *x.stride()[:3], *out.stride()[:3], of_row,
            triton.next_power_of_2(heads), triton.next_power_of_2(width // 2),
        )  # fmt: skip
