"""A decoding pass that is the same operations on the same tensors whatever its slots hold: what a CUDA graph needs.

Letters: B slots of a pass, K key/value heads, H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_ft.model.kv_cache import KVCache, held_positions


class StaticPass:
    """A `kv_cache.Pass` of one token for each of slots 0 .. B - 1 of a cache. Where they stand is in `starts_there`
    alone; all places of a ring are given to attention, and what is not held is hidden by numbers on the device.

    It may be gone through again and again, as long as the rings have room: the cache's lengths are counted by whoever
    does so, and `starts_there` [B] set to them before.
    """

    def __init__(self, cache: KVCache, slots: int, starts_there: Tensor) -> None:
        self.cache = cache
        self.tokens, self.single = 1, True
        self.slots = slice(0, slots)
        self.position_ids = starts_there[:, None]
        self._slots_there = torch.arange(slots, device=starts_there.device)
        self._places = {limit: starts_there % limit for limit in set(cache.limits)}  # of the new tokens

    @property
    def fresh(self) -> bool:
        """See `Pass.fresh`: nothing in Python knows."""
        return False

    def key_positions(self, layer: int) -> Tensor:
        """See `Pass.key_positions`: of every place of the layer's ring."""
        places = torch.arange(self.cache.rings[layer].parts[0].shape[2], device=self.position_ids.device)
        return held_positions(places, self.position_ids + 1, self.cache.limits[layer])

    def held(self, layer: int) -> Tensor:
        """See `Pass.held`."""
        return (self.position_ids[:, 0] + 1).clamp(max=self.cache.limits[layer])

    def sees_all(self, layer: int, window_tokens: int | None) -> bool:
        """See `Pass.sees_all`: nothing in Python knows."""
        return False

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """See `Pass.update`: all places of the slots' rings."""
        place = self._places[self.cache.limits[layer]]
        rings = [part[self.slots] for part in self.cache.rings[layer].parts]
        for ring, fresh in zip(rings, (key, value), strict=True):
            ring[self._slots_there, :, place] = fresh[:, :, 0].to(ring.dtype)
        return rings[0].to(key.dtype), rings[1].to(value.dtype)
