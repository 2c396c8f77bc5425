"""Attention with every score written out: what all other attention is compared with.

Letters: B batch, T query tokens, S key tokens, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_ft.errors import UserError
from gemma_ft.families.records import FAMILIES, known_families

CAPPED = known_families("and", (family for family in FAMILIES.values() if family.attn_softcap))
NO_CAP = f"attention: {{name}} cannot compute {CAPPED}'s soft-cap and would drop it; use auto, blockwise or eager"


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(cap(query · keyᵀ · scale), over visible keys) · value: the reference, every score written out.

    query [B, N, T, H], key and value [B, K, S, H], visible [B or 1, 1, T, S] -> [B, N, T, H] in query.dtype. Scores,
    cap and softmax are computed in float32 or wider. The cap comes before the mask. A query that sees no key (padding)
    gets the mean of all values: finite, and masked out wherever it could matter.
    Source: google/gemma_pytorch gemma/model.py GemmaAttention.forward.
    """
    batch, heads, tokens, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, width)  # [B, K, N/K * T, H]: keys are read once, never repeated
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (grouped @ key.transpose(2, 3)).to(wide).view(batch, heads, tokens, -1)  # [B, N, T, S]
    weights = F.dropout(attention_weights(scores, visible, scale, softcap), dropout_p)
    return (weights.to(query.dtype).view(*grouped.shape[:3], -1) @ value).view(query.shape)


def attention_weights(scores: Tensor, visible: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Raw scores [.., S], wide -> weights: scaled, capped, hidden where not `visible`, softmax."""
    scores = scores * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if visible is not None:
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1)


def sdpa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """torch's scaled_dot_product_attention with the interface of `eager_attention`, for models without a cap.

    Raises: UserError when a cap is asked for: SDPA would drop it without a word.
    """
    if softcap is not None:
        raise UserError(NO_CAP.format(name="sdpa"))
    visible = visible | ~visible.any(dim=-1, keepdim=True)  # a row without any key is NaN on some of SDPA's kernels
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=visible,
        scale=scale,
        dropout_p=dropout_p,
        enable_gqa=query.shape[1] != key.shape[1],
    )
