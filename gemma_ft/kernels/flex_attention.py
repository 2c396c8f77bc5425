"""Attention on a GPU through torch's FlexAttention: no T x T tensor, and blocks of keys that no query sees are skipped.

Letters: B batch, T tokens, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma_ft.kernels.gpu import serves as gpu

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

PROBED_TOKENS = 256


def block_mask(low: Tensor) -> BlockMask:
    """Query t of row b sees the keys low[b, t] .. t: low [B, T], and made once for all layers of that kind."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (low[b, query] <= key) & (key <= query)

    batch, tokens = low.shape
    make = _compiled(create_block_mask) if low.is_cuda else create_block_mask
    found: BlockMask = make(seen, batch, None, tokens, tokens, device=str(low.device))
    return found


def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, scale: float, softcap: float | None = None
) -> Tensor:
    """softmax(cap(query · keyᵀ · scale), over the keys of `mask`) · value.

    query [B, N, T, H], key and value [B, K, T, H] -> [B, N, T, H]. Compiled once for each kind of shapes on a GPU, and
    kept on the disk by torch; on a CPU every score is written out, which is for tests. The reference is
    model.attention.eager_attention.
    """
    from torch.nn.attention import flex_attention as torch_flex

    cap = softcap or 0.0

    def capped(score: Tensor, b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    attend: Any = _compiled(torch_flex.flex_attention) if query.is_cuda else torch_flex.flex_attention
    found: Tensor = attend(
        query, key, value, score_mod=capped if cap else None, block_mask=mask, scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return found


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


@cache
def reason_against(device: torch.device, head_dim: int, dtype: torch.dtype) -> str | None:
    """Why it does not run on a GPU, in words for the user; None: it does, forwards and backwards.

    Whether a card has the shared memory that a head dim of 256 takes backwards is known when it was tried.
    """
    if (against := gpu.reason_against(device, dtype)) is not None:
        return against
    if torch.cuda.get_device_capability(device) < gpu.CAPABILITY:
        return "this GPU is older than FlexAttention"

    def step() -> None:
        query, key, value = (
            torch.zeros(1, heads, PROBED_TOKENS, head_dim, dtype=dtype, device=device, requires_grad=True)
            for heads in (2, 1, 1)
        )
        low = torch.zeros(1, PROBED_TOKENS, dtype=torch.int64, device=device)
        flex_attention(query, key, value, block_mask(low), scale=1.0, softcap=30.0).sum().backward()
        torch.cuda.synchronize(device)

    failed = gpu.tried(step)
    return None if failed is None else f"FlexAttention does not run here ({failed})"
