"""Attention behind one small interface: (query, key, value, visible) -> out; what is visible; and the resolver that
picks a backend.

Letters: B batch, T query tokens, S key tokens, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gemma_ft.errors import UserError
from gemma_ft.kernels.attention import NO_CAP, eager_attention, sdpa_attention
from gemma_ft.kernels.backend import implementation_of
from gemma_ft.kernels.flex_attention import block_mask, is_short
from gemma_ft.model.shared_tokens import SharedTokens

Attend = Callable[..., Tensor]


class AttentionMask:
    """Which keys the queries of a layer see; each form of it is made when a backend asks, and once.

    `everything`: every query sees every key, and no mask needs to be made. `shared`: where layers are given the distinct
    tokens of a batch, how its sequences are made of them.
    """

    shared: SharedTokens | None = None

    def __init__(
        self,
        mask: Callable[[], Tensor],
        low: Callable[[], Tensor | None] = lambda: None,
        *,
        held: Callable[[], Tensor | None] = lambda: None,
        everything: bool = False,
    ) -> None:
        self._mask, self._low, self._held, self.everything = mask, low, held, everything
        self._blocks: list[Any] | None = None

    @cached_property
    def mask(self) -> Tensor:
        """bool [B or 1, 1, T, S], True = visible."""
        return self._mask()

    def block_mask(self, batch: int, device: torch.device) -> Any:
        """`low` as FlexAttention takes it, for a batch of that size: its kernel reads a row of it for each of the batch
        without looking whether there is one.
        """
        assert self.low is not None
        if self._blocks is None:
            self._blocks = [block_mask(self.low.expand(batch, -1).to(device).contiguous())]
        return self._blocks[0]

    @cached_property
    def held(self) -> Tensor | None:
        """[B]: the one query of each row sees the keys 0 .. held - 1. None where that is not all that can be said."""
        return self._held()

    @cached_property
    def low(self) -> Tensor | None:
        """[B or 1, T]: query t sees the keys low[t] .. t. None where that is not all that can be said."""
        return self._low()


def first_visible(
    tokens: int,
    *,
    window_tokens: int | None,
    key_is_real: Tensor | None = None,
    document: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor | None:
    """`AttentionMask.low` of a sequence without a cache: what `visible_keys` says of every query that is no padding. A
    query of padding sees itself at least.

    None where a document, or what is real, is not in one piece. `device`: where it lies (None: on the CPU).
    """
    begins = first_of_own(tokens, key_is_real=key_is_real, document=document, device=device)
    return None if begins is None else within_window(begins, window_tokens)


def first_of_own(
    tokens: int,
    *,
    key_is_real: Tensor | None = None,
    document: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor | None:
    """`first_visible` without a window: the same for all layers of a pass, for a GPU is waited for, once, to know
    whether there is such a thing.
    """
    places = torch.arange(tokens, device=device)
    low = torch.zeros_like(places)[None]
    pieces: list[Tensor] = []  # bool [B] each: whether a row has anything in more than one piece
    if document is not None:
        begins, ordered = torch.ones_like(document, dtype=torch.bool), document.sort(dim=1).values
        begins[:, 1:] = document[:, 1:] != document[:, :-1]
        pieces.append(begins.sum(dim=1) > 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(dim=1))
        low = torch.where(begins, places, 0).cummax(dim=1).values
    if key_is_real is not None:
        rises = key_is_real[:, 0].long() + (key_is_real[:, 1:] & ~key_is_real[:, :-1]).sum(dim=1)
        pieces.append(rises > 1)
        low = torch.maximum(low, key_is_real.long().argmax(dim=1, keepdim=True))
    if pieces and bool(torch.cat(pieces).any()):
        return None
    return torch.minimum(low, places)


def within_window(low: Tensor, window_tokens: int | None) -> Tensor:
    """`low` [B or 1, T] of full layers -> that of layers with this window."""
    if window_tokens is None:
        return low
    return torch.maximum(low, torch.arange(low.shape[1], device=low.device) - window_tokens + 1)


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


def _blockwise(query: Tensor, key: Tensor, value: Tensor, visible: AttentionMask, **options: Any) -> Tensor:
    """Blocks where queries see runs of keys, on a GPU by FlexAttention; a single query by itself; else every score
    written out, or on a GPU without a cap SDPA. In training mode the choice is the same with a gradient and without.
    """
    dropout_p, training = options.pop("dropout_p", 0.0), options.pop("training", False)
    single, whole = query.shape[2] == 1, query.shape[2] == key.shape[2]
    operation = "decode_attention" if single else "attention"
    fits = (single or whole) and not dropout_p and (training or single or not is_short(query))
    chosen = implementation_of(operation, query, key, value, fits=fits)
    match operation, chosen.name:
        case "decode_attention", "cpu":
            seen = None if visible.everything else visible.mask
            return chosen.run(query, key, value, seen, **options)
        case "decode_attention", "triton" if visible.held is not None:
            return chosen.run(query, key, value, visible.held, **options)
        case "attention", "cpu" if visible.low is not None:
            return chosen.run(query, key, value, visible.low, **options)
        case "attention", "flex" if visible.low is not None:
            blocks = visible.block_mask(len(query), query.device)
            return chosen.run(query, key, value, blocks, **options)
    capped = options.get("softcap") is not None
    attend = eager_attention if query.is_cpu or capped else sdpa_attention
    return attend(query, key, value, visible.mask, dropout_p=dropout_p, **options)


def _masked(attend: Attend) -> Attend:
    """A backend that takes a mask."""

    def attended(
        query: Tensor, key: Tensor, value: Tensor, visible: AttentionMask, *, training: bool = False, **options: Any
    ) -> Tensor:
        return attend(query, key, value, visible.mask, **options)

    return attended


BACKENDS: dict[str, Attend] = {
    "blockwise": _blockwise,
    "eager": _masked(eager_attention),
    "sdpa": _masked(sdpa_attention),
}


@dataclass(frozen=True)
class AttentionChoice:
    """The backend that will run, and why, in words for the user."""

    name: str
    reason: str


def resolve_attention(requested: str | None, softcap: float | None, *, windows: bool = False) -> AttentionChoice:
    """The attention of a model: `requested` is auto (or None) or a name of BACKENDS; `windows`: whether some of its
    layers have one. What computes it, the table of kernels/backend.py says.

    Raises: UserError for an unknown name, or a backend that cannot do the cap of this model.
    """
    if requested in (None, "auto"):
        if softcap is None and torch.cuda.is_available():  # given a mask, SDPA's fast kernels refuse on a GPU
            return AttentionChoice("blockwise", "FlexAttention, which takes documents and padding without a mask")
        if softcap is None and windows:  # SDPA takes a window as a mask alone, and computes what it hides
            return AttentionChoice("blockwise", "windows, in blocks: what they hide is not computed, and no mask made")
        if softcap is None:
            return AttentionChoice("sdpa", "this Gemma has no soft-cap")
        return AttentionChoice("blockwise", "the soft-cap, in blocks: our own on a CPU, FlexAttention on a GPU")
    if requested not in BACKENDS:
        *names, last = BACKENDS
        raise UserError(f"attention: unknown backend {requested!r}; use auto, {', '.join(names)} or {last}")
    if requested == "sdpa" and softcap is not None:
        raise UserError(NO_CAP.format(name=requested))
    return AttentionChoice(str(requested), "asked for")
