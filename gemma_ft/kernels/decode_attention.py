"""Attention of the one query that each sequence has when it decodes, on a GPU: the keys that its row holds, no mask.

Letters: B batch, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

from torch import Tensor

from gemma_ft.kernels.triton import triton_backend as gpu


def serves_one_query(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `one_query` takes these."""
    if not gpu.serves(query, keys, values):
        return False
    from gemma_ft.kernels.triton import decode_attention as kernel

    return kernel.serves_one_query(query, keys, values)


def one_query(
    query: Tensor, keys: Tensor, values: Tensor, held: Tensor, *, scale: float, softcap: float | None = None
) -> Tensor:
    """softmax(cap(query · keyᵀ · scale), over the places 0 .. held - 1) · value -> [B, N, 1, H].

    query [B, N, 1, H], keys and values [B, K, places, H], held [B]. The reference is
    model.attention.one_query_attention.
    """
    from gemma_ft.kernels.triton import decode_attention as kernel

    return kernel.one_query(query, keys, values, held, scale, softcap)
