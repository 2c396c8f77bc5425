"""Attention on the CPU without a T x T tensor: a block of queries at a time, against the keys that it can see at all.

Letters: B batch, T tokens, N query heads, K key/value heads, G = N / K, H head dim, Q queries and S keys of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_QUERIES = 256
SAFE_CAP = 60.0  # exp of it, summed over any number of keys, is far from float32's ends


def blockwise_attention(
    query: Tensor, key: Tensor, value: Tensor, low: Tensor, *, scale: float, softcap: float | None = None
) -> Tensor:
    """softmax(cap(query · keyᵀ · scale), over keys low[t] .. t) · value.

    query [B, N, T, H], key and value [B, K, T, H], low [B or 1, T] with 0 <= low[t] <= t -> [B, N, T, H] in
    query.dtype. Scores are rounded to query.dtype as a product of its matrices is, and then wide: cap and softmax in
    float32 or wider. Backward computes them again. The reference is model.attention.eager_attention.
    """
    low = low.expand(query.shape[0], -1)
    out: Tensor = _Blockwise.apply(query, key, value, low, scale, softcap)
    return out


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, low: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        out = torch.empty_like(query)  # [B, N, T, H]
        log_sum = torch.empty(query.shape[:3], dtype=wide)  # [B, N, T]
        for row, queries, keys in _blocks(low):
            q, k, v = _grouped(query[row, :, queries], key.shape[1]), key[row, :, keys], value[row, :, keys]
            scores, _ = _scores(q, k, scale, softcap)  # [K, G, Q, S]
            hidden = _hidden(low[row], queries, keys)
            if softcap is not None and softcap <= SAFE_CAP:  # its exponential overflows nowhere
                top = torch.zeros(())
            else:
                top = scores.masked_fill_(hidden, float("-inf")).amax(dim=-1, keepdim=True)
                scores.sub_(top)
            weights = scores.exp_().masked_fill_(hidden, 0.0)
            total = weights.sum(dim=-1, keepdim=True)
            log_sum[row, :, queries] = (top + total.log()).flatten(0, 1)[..., 0]
            said = weights.div_(total).to(query.dtype).flatten(1, 2) @ v  # [K, G Q, H]
            out[row, :, queries] = said.view(-1, q.shape[2], q.shape[3])
        ctx.save_for_backward(query, key, value, low, log_sum)
        ctx.scale, ctx.softcap = scale, softcap
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, low, log_sum = ctx.saved_tensors
        wide, kv_heads = log_sum.dtype, key.shape[1]
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros_like(one, dtype=wide) for one in (key, value))
        for row, queries, keys in _blocks(low):
            q, k, v = _grouped(query[row, :, queries], kv_heads), key[row, :, keys], value[row, :, keys]
            given = _grouped(upstream[row, :, queries], kv_heads)  # [K, G, Q, H]
            scores, tanh = _scores(q, k, ctx.scale, ctx.softcap)  # [K, G, Q, S]
            weights = scores.sub_(_grouped(log_sum[row, :, queries, None], kv_heads)).exp_()
            weights.masked_fill_(_hidden(low[row], queries, keys), 0.0)
            narrow = weights.to(query.dtype).flatten(1, 2)
            flat = given.flatten(1, 2)  # [K, G Q, H]
            grad_value[row, :, keys] += narrow.transpose(1, 2) @ flat
            grad = (flat @ v.transpose(1, 2)).to(wide).view_as(weights)
            # not from `out`, as flash attention has it: rounded to bf16, it would not cancel what it is to cancel
            grad.sub_(torch.linalg.vecdot(weights, grad)[..., None]).mul_(weights)
            if tanh is not None:  # d cap tanh(s / cap) / ds = 1 - tanh^2
                grad.mul_(torch.rsub(tanh.square_(), 1.0))
            grads = grad.mul_(ctx.scale).to(query.dtype).flatten(1, 2)  # [K, G Q, S]
            grad_query[row, :, queries] = (grads @ k).view(-1, given.shape[2], given.shape[3])
            grad_key[row, :, keys] += grads.transpose(1, 2) @ q.flatten(1, 2)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None


def _blocks(low: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """(row, its queries, the keys from the first to the last that any of them sees) of low [B, T]."""
    for row, firsts in enumerate(low):
        for start in range(0, len(firsts), BLOCK_QUERIES):
            stop = min(start + BLOCK_QUERIES, len(firsts))
            yield row, slice(start, stop), slice(int(firsts[start:stop].min()), stop)


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Capped scores [K, G, Q, S], wide, and the tanh that capped them."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.flatten(1, 2) @ k.transpose(1, 2)).to(wide).view(*q.shape[:3], -1)
    if softcap is None:
        return scores.mul_(scale), None
    tanh = scores.mul_(scale / softcap).tanh_()
    return tanh * softcap, tanh


def _hidden(low: Tensor, queries: slice, keys: slice) -> Tensor:
    """Which keys of a block its queries do not see: bool [Q, S]."""
    places = torch.arange(keys.start, keys.stop)
    return (places < low[queries, None]) | (places > torch.arange(queries.start, queries.stop)[:, None])


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[N, Q, ..] -> [K, G, Q, ..]: the query heads that share keys, side by side."""
    return x.reshape(kv_heads, -1, *x.shape[1:])
