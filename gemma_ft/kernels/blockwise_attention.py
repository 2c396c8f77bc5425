"""Attention on the CPU without a T x T tensor: a block of queries at a time, against the keys that it can see at all.

Letters: B batch, T tokens, N query heads, K key/value heads, G = N / K, H head dim, Q queries and S keys of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma_ft.kernels.backend import implementation_of
from gemma_ft.kernels.matmul import product_dtype

BLOCK_QUERIES = 256


def blockwise_attention(
    query: Tensor, key: Tensor, value: Tensor, low: Tensor, *, scale: float, softcap: float | None = None
) -> Tensor:
    """softmax(cap(query · keyᵀ · scale), over keys low[t] .. t) · value.

    query [B, N, T, H], key and value [B, K, T, H], low [B or 1, T] with 0 <= low[t] <= t -> [B, N, T, H] in
    query.dtype. Products are in the dtype that the processor multiplies fastest (matmul.py), and then wide: cap and
    softmax in float32 or wider. Backward computes the scores again. The reference is attention.eager_attention.
    """
    low = low.expand(query.shape[0], -1)
    out: Tensor = _Blockwise.apply(query, key, value, low, scale, softcap)
    return out


class _Blockwise(torch.autograd.Function):
    """Products in one dtype forwards and backwards, whatever autocast would make of them."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, low: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            out, log_sum = _attended(query, key, value, low, scale, softcap)
        ctx.save_for_backward(query, key, value, low, log_sum)
        ctx.scale, ctx.softcap = scale, softcap
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast("cpu", enabled=False):
            found = _gradients(upstream, *ctx.saved_tensors, scale=ctx.scale, softcap=ctx.softcap)
        return *found, None, None, None


def _attended(
    query: Tensor, key: Tensor, value: Tensor, low: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The output [B, N, T, H], and of each query the log of what its weights are divided by [B, N, T]."""
    wide = torch.promote_types(query.dtype, torch.float32)
    out = torch.empty(query.shape, dtype=query.dtype)  # [B, N, T, H]
    log_sum = torch.empty(query.shape[:3], dtype=wide)  # [B, N, T]
    at = product_dtype(query)
    for row, queries, keys in _blocks(low):
        q = _grouped(query[row, :, queries].to(at), key.shape[1])
        k, v = key[row, :, keys].to(at), value[row, :, keys].to(at)
        flat = q.flatten(1, 2)  # [K, G Q, H]
        block = Block(low[row, queries] - keys.start, queries.start - keys.start, q.shape[:3], scale, softcap)
        raw = flat @ k.transpose(1, 2)  # [K, G Q, S]
        chosen = implementation_of("attention_block", raw, fits=raw.is_contiguous())
        weights, log_sum[row, :, queries] = chosen.run(block, raw)
        out[row, :, queries] = (weights @ v).view(-1, q.shape[2], q.shape[3])
    return out, log_sum


def _gradients(
    upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, low: Tensor, log_sum: Tensor, *, scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of query, key and value; the scores are computed again."""
    wide, kv_heads = log_sum.dtype, key.shape[1]
    grad_query = torch.empty(query.shape, dtype=query.dtype)
    grad_key, grad_value = (torch.zeros(one.shape, dtype=wide) for one in (key, value))
    at = product_dtype(query)
    for row, queries, keys in _blocks(low):
        q = _grouped(query[row, :, queries].to(at), kv_heads)
        k, v = key[row, :, keys].to(at), value[row, :, keys].to(at)
        given = _grouped(upstream[row, :, queries].to(at), kv_heads).flatten(1, 2)  # [K, G Q, H]
        flat = q.flatten(1, 2)
        block = Block(low[row, queries] - keys.start, queries.start - keys.start, q.shape[:3], scale, softcap)
        raw, slope = flat @ k.transpose(1, 2), given @ v.transpose(1, 2)  # [K, G Q, S]
        chosen = implementation_of("attention_block", raw, slope, fits=raw.is_contiguous() and slope.is_contiguous())
        weights, grads = chosen.backward(block, raw, slope, log_sum[row, :, queries])
        grad_value[row, :, keys] += weights.transpose(1, 2) @ given
        grad_query[row, :, queries] = (grads @ k).view(-1, q.shape[2], q.shape[3])
        grad_key[row, :, keys] += grads.transpose(1, 2) @ flat
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


@dataclass(frozen=True)
class Block:
    """Some queries of one sequence and the keys that any of them sees: query i sees those from low[i] to last + i.
    Scores of a block are [K, G Q, S].
    """

    low: Tensor  # [Q]
    last: int
    shape: tuple[int, ...]  # K, G, Q
    scale: float
    softcap: float | None

    @property
    def heads(self) -> int:
        """Query heads, N."""
        return self.shape[0] * self.shape[1]

    def scores(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """Capped scores [K, G, Q, S], wide, and the tanh that capped them."""
        scores = raw.to(torch.promote_types(raw.dtype, torch.float32)).view(*self.shape, -1)
        if self.softcap is None:
            return scores.mul_(self.scale), None
        tanh = scores.mul_(self.scale / self.softcap).tanh_()
        return tanh * self.softcap, tanh

    def hidden(self, keys: int) -> Tensor:
        """Which keys of the block its queries do not see: bool [Q, S]."""
        places = torch.arange(keys)
        return (places < self.low[:, None]) | (places > self.last + torch.arange(self.shape[2])[:, None])


def block_weights(block: Block, raw: Tensor) -> tuple[Tensor, Tensor]:
    """Scores, which may be written over -> weights in their dtype, and log of their sum [N, Q], wide."""
    scores, _ = block.scores(raw)  # [K, G, Q, S]
    hidden = block.hidden(raw.shape[-1])
    top = scores.masked_fill_(hidden, float("-inf")).amax(dim=-1, keepdim=True)
    weights = scores.sub_(top).exp_().masked_fill_(hidden, 0.0)
    total = weights.sum(dim=-1, keepdim=True)
    log_sum = (top + total.log()).flatten(0, 1)[..., 0]
    return weights.div_(total).to(raw.dtype).flatten(1, 2), log_sum


def block_gradients(block: Block, raw: Tensor, grad: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and the gradient of the weights, which may be written over, and the weights' log sums [N, Q] -> weights,
    gradient of the scores.
    """
    scores, tanh = block.scores(raw)
    weights = scores.sub_(log_sum.view(*block.shape, 1)).exp_()
    weights.masked_fill_(block.hidden(raw.shape[-1]), 0.0)
    narrow = weights.to(raw.dtype).flatten(1, 2)
    slope = grad.to(scores.dtype).view_as(weights)
    # not from the output, as flash attention has it: rounded to bf16, it would not cancel what it is to cancel
    slope = slope.sub_(torch.linalg.vecdot(weights, slope)[..., None]).mul_(weights)
    if tanh is not None:  # d cap tanh(s / cap) / ds = 1 - tanh^2
        slope.mul_(torch.rsub(tanh.square_(), 1.0))
    return narrow, slope.mul_(block.scale).to(raw.dtype).flatten(1, 2)


def _blocks(low: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """(row, its queries, the keys from the first to the last that any of them sees) of low [B, T]."""
    for row, firsts in enumerate(low):
        for start in range(0, len(firsts), BLOCK_QUERIES):
            stop = min(start + BLOCK_QUERIES, len(firsts))
            yield row, slice(start, stop), slice(int(firsts[start:stop].min()), stop)


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[N, Q, ..] -> [K, G, Q, ..]: the query heads that share keys, side by side."""
    return x.reshape(kv_heads, -1, *x.shape[1:])
