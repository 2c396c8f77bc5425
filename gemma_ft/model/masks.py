"""What each layer of a forward pass sees, out of what the model was given: a mask, documents, positions, a cache.

Letters: B batch, T query tokens, S keys (cached ones included).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache as kept
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from gemma_ft.errors import UserError
from gemma_ft.model.attention import AttentionMask, first_of_own, first_visible, visible_keys, within_window
from gemma_ft.model.kv_cache import Pass

Windows = Sequence[int | None]
NOBODY = -1  # the document of places in a cache that hold nothing yet


def masks_of(
    batch: Tensor,
    windows: Windows,
    attention_mask: Tensor | None,
    document_ids: Tensor | None,
    cache: Cache | None,
    seen: int | Tensor,
) -> dict[int | None, AttentionMask]:
    """What the queries of a batch [B, T, ...] see behind `seen` cached tokens, for each kind of layer: by its window.

    attention_mask [B, S], document_ids [B, T]: as `GemmaForCausalLM.forward` takes them. Raises: UserError for a mask
    of another form, ValueError for documents behind cached tokens.
    """
    tokens, device = batch.shape[1], batch.device
    if document_ids is not None and seen:
        raise ValueError("document_ids cannot be combined with a filled cache")
    _check_mask(attention_mask)
    query_index = torch.arange(tokens, device=device) + seen

    @kept
    def begins() -> Tensor | None:
        real = None if attention_mask is None else attention_mask.bool()
        return first_of_own(tokens, key_is_real=real, document=document_ids, device=device)

    def runs(window: int | None) -> Tensor | None:
        low = begins()
        return None if low is None else within_window(low, window)

    masks: dict[int | None, AttentionMask] = {}
    for index, window in enumerate(windows):
        if window in masks:
            continue
        # A cache may hold only the newest keys of a local layer: their places start at `offset`.
        length, offset = (tokens, 0) if cache is None else cache.get_mask_sizes(tokens, index)
        mask = partial(
            visible_keys,
            query_index,
            torch.arange(offset, offset + length, device=device),
            window_tokens=window,
            key_is_real=None if attention_mask is None else _filled(attention_mask, offset, length, 0).bool(),
            query_document=document_ids,
            key_document=None if document_ids is None else _filled(document_ids, offset, length, NOBODY),
        )
        masks[window] = AttentionMask(mask, partial(runs, window)) if cache is None else AttentionMask(mask)
    return masks


def _filled(of_tokens: Tensor, offset: int, length: int, nothing: int) -> Tensor:
    """A number of each token so far [B, S] -> one of each place of a cache [B, length], whose first holds token
    `offset`: a static cache is longer than what has been said, and its empty places are `nothing`.
    """
    missing = max(offset + length - of_tokens.shape[1], 0)
    return nn.functional.pad(of_tokens, (0, missing), value=nothing)[:, offset : offset + length]


def _check_mask(mask: Any) -> None:
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
        return
    found = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
    raise UserError(
        f"attention_mask: expected ones and zeros, [batch, tokens], got {found}; packed documents are told apart by "
        "document_ids, or by position_ids that restart"
    )


def masks_of_pass(one: Pass, windows: Windows) -> dict[int | None, AttentionMask]:
    """As `masks_of`, for rows that each stand at their own position."""

    def visible(window: int | None) -> AttentionMask:
        layer = list(windows).index(window)

        def mask() -> Tensor:
            return visible_keys(one.position_ids, one.key_positions(layer), window_tokens=window)

        def runs() -> Tensor | None:  # padding at the end of a row hides itself from those before it
            device = one.position_ids.device
            return first_visible(one.tokens, window_tokens=window, device=device) if one.fresh else None

        def held() -> Tensor | None:
            return one.held(layer) if one.single else None

        return AttentionMask(mask, runs, held=held, everything=one.sees_all(layer, window))

    return {window: visible(window) for window in set(windows)}


def documents_of(position_ids: Tensor) -> Tensor:
    """Position ids [B, T] -> document ids [B, T]: a new document wherever positions do not go on by one."""
    breaks = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return nn.functional.pad(breaks.long().cumsum(dim=1), (1, 0))
