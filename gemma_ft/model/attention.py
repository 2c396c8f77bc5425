"""Attention behind one small interface: (query, key, value, visible) -> out; the masks; and the resolver that picks a
backend.

Letters: B batch, T query tokens, S key tokens, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_ft.errors import UserError

Attend = Callable[..., Tensor]


def visible_keys(
    query_index: Tensor,
    key_index: Tensor,
    *,
    window_tokens: int | None = None,
    key_is_real: Tensor | None = None,
    query_document: Tensor | None = None,
    key_document: Tensor | None = None,
) -> Tensor:
    """Which key each query may see: bool [B or 1, 1, T, S], True = visible.

    A key is visible when it is not in the future, lies within the window (query - window < key <= query: exactly
    `window_tokens` keys with the query's own), is no padding, and belongs to the query's document.

    query_index [T], key_index [S]: places in the sequence counted from its first token, cached tokens included; where
    rows stand at different places, [B, T] and [B, S], with -1 for what is no token. key_is_real [B, S] bool.
    query_document [B, T] and key_document [B, S] integers.
    Source: google/gemma_pytorch gemma/model.py (local mask); arXiv:2408.00118 section 2.
    """
    query, key = query_index[..., :, None], key_index[..., None, :]  # [.., T, 1], [.., 1, S]
    visible = key <= query
    if window_tokens is not None:
        visible = visible & (key > query - window_tokens)
    by_row = key_index.dim() == 2
    visible = (visible & (key >= 0))[:, None] if by_row else visible[None, None]  # [B or 1, 1, T, S]
    if key_is_real is not None:
        visible = visible & key_is_real[:, None, None, :]
    if query_document is not None and key_document is not None:
        visible = visible & (query_document[:, None, :, None] == key_document[:, None, None, :])
    return visible


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
    scores = (grouped @ key.transpose(2, 3)).to(wide).view(batch, heads, tokens, -1) * scale  # [B, N, T, S]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, torch.finfo(wide).min)
    weights = F.dropout(scores.softmax(dim=-1), dropout_p)
    return (weights.to(query.dtype).view(*grouped.shape[:3], -1) @ value).view(query.shape)


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
        raise UserError(_NO_CAP.format(name="sdpa"))
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


BACKENDS: dict[str, Attend] = {"eager": eager_attention, "sdpa": sdpa_attention}
_NO_CAP = "attention: {name} cannot compute Gemma 2's soft-cap and would drop it; use auto or eager"


@dataclass(frozen=True)
class AttentionChoice:
    """The backend that will run, and why, in words for the user."""

    name: str
    reason: str


def resolve_attention(requested: str | None, softcap: float | None) -> AttentionChoice:
    """The one place where an attention backend is chosen: `requested` is auto (or None) or a name of BACKENDS.

    Raises: UserError for an unknown name, or a backend that cannot do the cap of this model.
    """
    if requested in (None, "auto"):
        if softcap is None:
            return AttentionChoice("sdpa", "this Gemma has no soft-cap")
        return AttentionChoice("eager", "the soft-cap needs it")
    if requested not in BACKENDS:
        raise UserError(f"attention: unknown backend {requested!r}; use auto, {' or '.join(BACKENDS)}")
    if requested != "eager" and softcap is not None:
        raise UserError(_NO_CAP.format(name=requested))
    return AttentionChoice(str(requested), "asked for")
