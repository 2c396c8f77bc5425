"""Attention of the one query that each sequence has when it decodes.

Letters: B batch, S key tokens, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_ft.kernels.attention import attention_weights


def decode_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, *, scale: float, softcap: float | None = None
) -> Tensor:
    """`attention.eager_attention` of a single query of each sequence, [B, N, 1, H]; `visible` None: it sees every key.

    The keys come first in the product: on a CPU the same product the other way round takes several times as long.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])  # [B, K, N/K, H]
    scores = (key @ grouped.transpose(2, 3)).transpose(2, 3)  # [B, K, N/K, S]
    scores = scores.to(wide, memory_format=torch.contiguous_format)
    return (attention_weights(scores, visible, scale, softcap).to(query.dtype) @ value).view(query.shape)
