"""Keys and values of several sequences at once, each with its own length, so that sequences may join and leave between
two forward passes.

Every layer keeps a ring: the key at position p lies at place p % limit. A local layer's limit is its window, a full
layer's the longest sequence, which therefore never wraps. Which position a place holds follows from the length of its
slot alone; nothing has to be cleared when a slot is given to another sequence.
Letters: B slots of a pass, T new tokens, S keys, K key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from gemma_ft.system.limits import FIRST_PLACES


class KVCache:
    """Preallocated keys and values for `slots` sequences of up to `max_seq_len` tokens.

    `window_tokens`: each layer's window, None for full attention. Memory is taken at the first pass, in the dtype and
    on the device of the keys that it brings, and grows with the longest sequence.
    """

    def __init__(self, window_tokens: Sequence[int | None], *, slots: int, max_seq_len: int) -> None:
        self.limits = [min(window or max_seq_len, max_seq_len) for window in window_tokens]
        self.max_seq_len = max_seq_len
        self.lengths = [0] * slots  # tokens that each slot holds
        self.rings = [_Ring(limit, slots) for limit in self.limits]
        self.kept: list[Any] = []  # what `decoded` keeps from pass to pass

    def open(self, first: int, counts: Sequence[int], device: torch.device) -> KVPass:
        """One forward pass over `len(counts)` slots from slot `first` on, which brings counts[i] new tokens for slot i.

        Either every count is 1, or all slots have the same length before.
        """
        return KVPass(self, first, counts, device)

    def places(self, tokens: int) -> tuple[int, ...]:
        """How many places each ring has, once there is room for slots of so many tokens; where a number stays the same,
        so do the tensors.
        """
        for ring in self.rings:
            keys, values = ring.parts
            ring.reserve(min(ring.limit, tokens), keys, values, self.lengths)
        return tuple(ring.parts[0].shape[2] for ring in self.rings)

    def move(self, source: int, target: int) -> None:
        """Give slot `target` what slot `source` holds; `source` is empty then."""
        if source != target:
            self.lengths[target] = self.lengths[source]
            for ring in self.rings:
                ring.move(source, target, self.lengths[source])
        self.lengths[source] = 0

    def nbytes(self) -> int:
        """Memory that keys and values take."""
        return sum(part.nbytes for ring in self.rings for part in ring.parts)


class _Ring:
    """One layer's keys and values, each [slots, K, places, H], with at most `limit` places."""

    def __init__(self, limit: int, slots: int) -> None:
        self.limit = limit
        self.slots = slots
        self.parts: tuple[Tensor, ...] = ()

    def reserve(self, needed: int, key: Tensor, value: Tensor, lengths: Sequence[int]) -> None:
        """Have at least `needed` places; slots keep what they hold, `lengths` tokens."""
        places = self.parts[0].shape[2] if self.parts else 0
        if places >= needed:
            return
        grown = min(self.limit, max(needed, 2 * places, FIRST_PLACES))
        # Zeros, for what is hidden still meets a weight of 0, and 0 * NaN is NaN.
        parts = tuple(part.new_zeros(self.slots, part.shape[1], grown, part.shape[3]) for part in (key, value))
        for old, new in zip(self.parts, parts, strict=False):
            for slot, length in enumerate(lengths):
                new[slot, :, : min(length, places)] = old[slot, :, :length]
        self.parts = parts

    def move(self, source: int, target: int, length: int) -> None:
        for part in self.parts:
            part[target, :, :length] = part[source, :, :length]


class Pass(Protocol):
    """One forward pass over neighbouring slots of a KVCache, as the model takes it for `past_key_values`: KVPass, or
    static_pass.StaticPass.

    `tokens`: new ones of each slot, T, at most. `single`: it is one of every slot. `position_ids` [B, T]: their
    positions, -1 for padding at the end of a slot, whose keys nobody sees.
    """

    tokens: int
    single: bool
    position_ids: Tensor

    @property
    def fresh(self) -> bool:
        """Whether the slots hold nothing before this pass: its keys are then the new tokens', in their order."""

    def key_positions(self, layer: int) -> Tensor:
        """Positions [B, S] of the keys that `update` gives for this layer; -1: no key."""

    def held(self, layer: int) -> Tensor:
        """How many places [B] of this layer's ring hold a key that the one new token of each slot sees; they are the
        first ones, for no ring is longer than its layer's window.
        """

    def sees_all(self, layer: int, window_tokens: int | None) -> bool:
        """Whether the one new token of every slot sees all keys that `update` gives for this layer."""

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Keep the new keys and values [B, K, T, H]; returns those to attend over, [B, K, S, H]."""


class KVPass:
    """A pass whose slots stand where the cache says: as many operations as they need."""

    def __init__(self, cache: KVCache, first: int, counts: Sequence[int], device: torch.device) -> None:
        self.cache = cache
        self.counts = list(counts)
        self.tokens = max(counts)
        self.slots = slice(first, first + len(counts))
        self.starts = cache.lengths[self.slots]
        self.single = self.tokens == 1
        assert min(counts) >= 1, "every row of a pass brings a token"
        assert self.single or len(set(self.starts)) == 1, "rows of different lengths take one token at a time"
        assert self.newest < cache.max_seq_len, "the sequence is longer than the cache"
        starts, counted = torch.tensor([self.starts, self.counts], device=device)[..., None]  # [B, 1] each
        steps = torch.arange(self.tokens, device=device)
        self.position_ids = (starts + steps).where(steps < counted, -1)
        self._plans = {limit: _Plan(self, limit, starts, starts + counted) for limit in set(cache.limits)}

    @property
    def newest(self) -> int:
        """The last position that any slot holds after this pass."""
        return max(start + count for start, count in zip(self.starts, self.counts, strict=True)) - 1

    @property
    def fresh(self) -> bool:
        """See `Pass.fresh`."""
        return not any(self.starts)

    def key_positions(self, layer: int) -> Tensor:
        """See `Pass.key_positions`."""
        return self._plans[self.cache.limits[layer]].key_positions

    def held(self, layer: int) -> Tensor:
        """See `Pass.held`."""
        return self._plans[self.cache.limits[layer]].held

    def sees_all(self, layer: int, window_tokens: int | None) -> bool:
        """See `Pass.sees_all`: no slot is shorter than what is read of the ring, and that is not over the window."""
        needed = self._plans[self.cache.limits[layer]].needed
        within = window_tokens is None or needed <= window_tokens
        return self.single and within and min(self.starts) + 1 >= needed

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """See `Pass.update`."""
        ring, plan = self.cache.rings[layer], self._plans[self.cache.limits[layer]]
        ring.reserve(plan.needed, key, value, self.cache.lengths)
        new = key, value
        kept = [part[self.slots, :, : plan.needed] for part in ring.parts]
        seen = kept
        if plan.wraps:  # what the first of the new tokens still see will be written over by the last
            seen = [
                torch.cat((old[:, :, : plan.old].to(fresh.dtype), fresh), dim=2)
                for old, fresh in zip(kept, new, strict=True)
            ]
        for part, fresh in zip(kept, new, strict=True):
            plan.store(part, fresh)
        return seen[0].to(key.dtype), seen[1].to(value.dtype)

    def rings(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of this pass's slots [B, K, places, H], with places for the new ones, which are like `like`
        [B, K, 1, H]: for who writes them there without `update`.
        """
        ring, plan = self.cache.rings[layer], self._plans[self.cache.limits[layer]]
        ring.reserve(plan.needed, like, like, self.cache.lengths)
        keys, values = ring.parts
        return keys[self.slots], values[self.slots]

    def finish(self) -> None:
        """Count the new tokens to their slots, when all layers have kept theirs."""
        self.cache.lengths[self.slots] = [start + count for start, count in zip(self.starts, self.counts, strict=True)]


class _Plan:
    """Where a pass writes in the rings of one limit, and which positions its queries then find there."""

    def __init__(self, one: KVPass, limit: int, starts: Tensor, ends: Tensor) -> None:
        begin = one.starts[0]
        self.begin, self.end, self.single = begin, begin + one.tokens, one.single
        self.wraps = not one.single and self.end > limit
        self.needed = min(limit, one.newest + 1 if one.single else self.end)
        self.old = min(limit, begin)
        self.limit, self.starts, self.ends, self.new = limit, starts, ends, one.position_ids
        if self.wraps:
            source = (self._after - starts)[:, None, :, None]  # the new token that a place takes; negative: none
            self.takes, self.source = source >= 0, source.clamp(min=0)
        if one.single:
            self.slot = torch.arange(len(one.counts), device=starts.device)
            self.place = starts[:, 0] % limit

    @cached_property
    def _after(self) -> Tensor:
        """The positions [B, needed] that the places hold once the new tokens are stored."""
        return held_positions(torch.arange(self.needed, device=self.starts.device), self.ends, self.limit)

    @cached_property
    def held(self) -> Tensor:
        """See `Pass.held`."""
        return self.ends[:, 0].clamp(max=self.limit)

    @cached_property
    def key_positions(self) -> Tensor:
        """See `Pass.key_positions`; made only for those who need a mask."""
        if not self.wraps:
            return self._after
        before = held_positions(torch.arange(self.old, device=self.starts.device), self.starts, self.limit)
        return torch.cat((before, self.new), dim=1)

    def store(self, kept: Tensor, fresh: Tensor) -> None:
        """Write the new tokens' [B, K, T, H] into the places [B, K, needed, H] of their slots."""
        if self.single:
            kept[self.slot, :, self.place] = fresh[:, :, 0].to(kept.dtype)
        elif self.wraps:
            _, heads, _, width = fresh.shape
            chosen = fresh.gather(2, self.source.expand(-1, heads, -1, width)).to(kept.dtype)
            kept.copy_(chosen.where(self.takes, kept))
        else:  # padding lies past its slot's end, where no position is held
            kept[:, :, self.begin : self.end] = fresh


def held_positions(places: Tensor, lengths: Tensor, limit: int) -> Tensor:
    """The position that each place [S] of a ring holds in slots of these lengths [B, 1]: [B, S], -1 for none."""
    newest = lengths - 1
    return (newest - (newest - places) % limit).clamp(min=-1)
