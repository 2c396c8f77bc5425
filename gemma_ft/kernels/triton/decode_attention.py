"""Attention of one query of each sequence over the places that its row holds, in Triton: flash decoding.

Letters: B batch, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma_ft.kernels.triton.activations import tanh

# A program takes SPAN places of a key head, whatever the ring's length: a row's sums are the same in every ring and
# batch. They are so few that a single short sequence is already read by many programs.
SPAN = 64
# Places at a time, warps, and Triton's stages. In bf16 all keys and values of a span are under way at once, in 73 KiB
# of shared memory; in float32, where no tensor core multiplies, registers and shared memory hold less.
STEPS = {torch.bfloat16: (32, 4, 3), torch.float32: (16, 8, 2)}
GROUP = 16  # queries that a tensor core takes; fewer are filled up: reading the keys takes longer than multiplying them
TOGETHER, WIDTH = 64, 64  # spans that are joined at a time, and how much of a head by one program


@triton.jit(do_not_specialize=["spans"], do_not_specialize_on_alignment=["held"])
def _spans(
    query, keys, values, held, tops, totals, sums, spans, scale, cap, q_b, q_head, k_b, k_head, k_place, v_b, v_head,
    v_place, CAPS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, H: tl.constexpr, SPAN: tl.constexpr,
    STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    start, head, b = tl.program_id(0) * SPAN, tl.program_id(1), tl.program_id(2).to(tl.int64)
    seen = tl.load(held + b).to(tl.int32)
    if start >= seen:
        return
    one, at = tl.arange(0, GROUP), tl.arange(0, H)
    real = one < HEADS
    query_at = query + b * q_b + (head * HEADS + one[:, None]) * q_head + at[None, :]
    asked = tl.load(query_at, mask=real[:, None], other=0.0)
    key_at = keys + b * k_b + head * k_head + at[:, None]
    value_at = values + b * v_b + head * v_head + at[None, :]
    top, total = tl.full((GROUP,), float("-inf"), tl.float32), tl.zeros((GROUP,), tl.float32)
    found = tl.zeros((GROUP, H), tl.float32)
    for first in tl.range(start, tl.minimum(start + SPAN, seen), STEP, num_stages=STAGES):
        place = first + tl.arange(0, STEP)
        key = tl.load(key_at + place[None, :] * k_place, mask=place[None, :] < seen, other=0.0)
        scores = tl.dot(asked, key, input_precision="ieee") * scale
        if CAPS:
            scores = cap * tanh(scores / cap)
        scores = tl.where(place[None, :] < seen, scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, axis=1))
        fade, weights = tl.exp(top - new), tl.exp(scores - new[:, None])
        # What is not seen may be NaN, which a weight of 0 would not hide.
        value = tl.load(value_at + place[:, None] * v_place, mask=place[:, None] < seen, other=0.0)
        found = tl.dot(weights.to(value.dtype), value, found * fade[:, None], input_precision="ieee")
        total = total * fade + tl.sum(weights, axis=1)
        top = new
    to = ((b * tl.num_programs(1) + head) * HEADS + one) * spans + tl.program_id(0)
    tl.store(tops + to, top, mask=real)
    tl.store(totals + to, total, mask=real)
    tl.store(sums + to[:, None] * H + at[None, :], found, mask=real[:, None])


@triton.jit(do_not_specialize=["spans"], do_not_specialize_on_alignment=["held"])
def _joined(
    tops, totals, sums, held, out, heads, spans,
    H: tl.constexpr, SPAN: tl.constexpr, TOGETHER: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    used = tl.cdiv(tl.load(held + row // heads).to(tl.int32), SPAN)  # of the others nothing was written
    top, total, found = float("-inf"), 0.0, tl.zeros((WIDTH,), tl.float32)
    for first in tl.range(0, used, TOGETHER):
        span = first + tl.arange(0, TOGETHER)
        there, place = span < used, row * spans + span
        tops_there = tl.load(tops + place, mask=there, other=float("-inf"))
        new = tl.maximum(top, tl.max(tops_there, axis=0))
        fade, weights = tl.exp(top - new), tl.exp(tops_there - new)
        total = total * fade + tl.sum(tl.load(totals + place, mask=there, other=0.0) * weights, axis=0)
        part = tl.load(sums + place[:, None] * H + at[None, :], mask=there[:, None], other=0.0)
        found = found * fade + tl.sum(part * weights[:, None], axis=0)
        top = new
    tl.store(out + row * H + at, (found / total).to(out.dtype.element_ty))


def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, held: Tensor, scale: float, softcap: float | None = None
) -> Tensor:
    """softmax(cap(query · keyᵀ · scale), over the places 0 .. held - 1) · value -> [B, N, 1, H] in query.dtype; scores
    and softmax in float32. Only where `serves_decode_attention`.

    query [B, N, 1, H], keys and values [B, K, places, H]; held: int64 [B], on the GPU, at least 1. Nothing waits for
    the GPU, and what is started depends on shapes alone: a CUDA graph may hold it, while `held` grows.
    Source: arXiv:2205.14135; its splitting: https://crfm.stanford.edu/2023/10/12/flashdecoding.html.
    """
    batch, heads, _, width = query.shape
    _, key_heads, places, _ = keys.shape
    spans, (step, warps, stages) = triton.cdiv(places, SPAN), STEPS[query.dtype]
    tops, totals = (query.new_empty((batch, heads, spans), dtype=torch.float32) for _ in range(2))
    sums = query.new_empty((batch, heads, spans, width), dtype=torch.float32)
    out = torch.empty((batch, heads, 1, width), dtype=query.dtype, device=query.device)
    with torch.cuda.device_of(query):
        _spans[(spans, key_heads, batch)](
            query, keys, values, held, tops, totals, sums, spans, scale, softcap or 1.0,
            *query.stride()[:2], *keys.stride()[:3], *values.stride()[:3],
            softcap is not None, heads // key_heads, GROUP, width, SPAN, step, stages, num_warps=warps,
        )  # fmt: skip
        _joined[(batch * heads, triton.cdiv(width, WIDTH))](
            tops, totals, sums, held, out, heads, spans, width, SPAN, TOGETHER, min(width, WIDTH)
        )
    return out


def serves_decode_attention(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `decode_attention` takes these: a group of up to GROUP heads, a head dim that is a power of two from 16
    to 256, all of one dtype. That Triton runs there is known.
    """
    _, heads, tokens, width = query.shape
    return (
        tokens == 1
        and heads % keys.shape[1] == 0
        and heads // keys.shape[1] <= GROUP
        and width in (16, 32, 64, 128, 256)
        and query.dtype in STEPS
        and query.dtype == keys.dtype == values.dtype
        and query.stride(-1) == keys.stride(-1) == values.stride(-1) == 1
    )
