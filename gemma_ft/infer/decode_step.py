"""One token for each sequence that speaks: recorded as a CUDA graph on a GPU, where starting a thousand small kernels
takes several times as long as they do.

Letters: B sequences, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gemma_ft.kernels.triton.cuda_graph import Recorder
from gemma_ft.model.kv_cache import KVCache
from gemma_ft.model.static_pass import StaticPass
from gemma_ft.system import environment

PATIENCE = 3  # steps of a kind that are made one by one before one is recorded: recording takes as long as several
MOST = 16  # recordings that are kept at a time
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


class DecodeSteps:
    """Decodes slots 0 .. B - 1 of a cache with one model, whose logits are the same whether a step is recorded or not.
    Meanwhile its weights stay where they lie, and adapters are not merged; they may be switched.

    `record`: what records, kernels.triton.cuda_graph.Recorder for one (None: a step is made operation by operation).
    `reason`: why nothing is recorded any more, where that was tried and failed.
    """

    def __init__(self, native: Any, cache: KVCache, device: torch.device, record: Record | None) -> None:
        self._native, self._cache, self._device, self._record = native, cache, device, record
        self._recorded: dict[Any, _Step] = {}
        self._seen: tuple[Any, int] = (None, 0)
        self._switched = next((one for one in native.modules() if hasattr(one, "merged_adapters")), None)
        self.reason: str | None = None

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """The last token of each slot -> logits [B, V] of its next one; they are read before the next step. The cache
        holds the tokens then.
        """
        slots = len(tokens)
        step = None if self._record is None else self._step(tokens)
        if step is None:
            one = self._cache.open(0, [1] * slots, self._device)
            ids = torch.tensor(tokens, device=self._device)[:, None]
            logits = self._logits(ids, one)
            one.finish()
            return logits
        logits = step(tokens, self._cache.lengths[:slots])
        self._cache.lengths[:slots] = [length + 1 for length in self._cache.lengths[:slots]]
        return logits

    def _step(self, tokens: Sequence[int]) -> _Step | None:
        """The recorded step for so many slots in rings of their size; None: not yet, or never."""
        assert self._record is not None
        slots = len(tokens)
        newest = max(self._cache.lengths[:slots])
        assert newest < self._cache.max_seq_len, "the sequence is longer than the cache"
        key = (slots, self._cache.places(newest + 1), self._adapters())
        if key in self._recorded:
            self._recorded[key] = self._recorded.pop(key)  # what is used lately is kept longest
            return self._recorded[key]
        self._seen = key, self._seen[1] + 1 if self._seen[0] == key else 1
        if self._seen[1] <= PATIENCE:
            return None
        # those of rings that have grown since hold memory that nothing else does
        kept = [(other, one) for other, one in self._recorded.items() if other[1] == key[1]]
        self._recorded = dict(kept[1 - MOST :])
        try:
            self._recorded[key] = _Step(self._logits, self._cache, tokens, self._device, self._record)
        except RuntimeError as error:
            self._record, self._recorded = None, {}
            self.reason = (str(error).strip().splitlines() or ["without a word"])[0]
            _tell(self.reason)
            return None
        return self._recorded[key]

    def _adapters(self) -> Any:
        """What the model computes beside its weights: it may be asked with its adapter and without."""
        one = self._switched
        return one and (one.disable_adapters, tuple(one.active_adapters), tuple(one.merged_adapters))

    def _logits(self, ids: Tensor, one: Any) -> Tensor:
        states = self._native.model(ids, past_key_values=one, use_cache=True).last_hidden_state
        logits: Tensor = self._native.head_logits(states[:, -1])
        return logits


class _Step:
    """A recorded step of so many slots, and the tensors that it reads and gives. Recording makes the step with these
    `tokens`, as often as it likes: each time the same keys and values go to the same places.
    """

    def __init__(
        self,
        logits: Callable[[Tensor, Any], Tensor],
        cache: KVCache,
        tokens: Sequence[int],
        device: torch.device,
        record: Record,
    ) -> None:
        slots = len(tokens)
        self._given = torch.tensor([tokens, cache.lengths[:slots]], device=device)  # and where they stand

        def run() -> Tensor:
            return logits(self._given[0][:, None], StaticPass(cache, slots, self._given[1]))

        self._repeat, self._logits = record(run)

    def __call__(self, tokens: Sequence[int], starts: Sequence[int]) -> Tensor:
        self._given.copy_(torch.tensor([tokens, starts]))
        self._repeat()
        return self._logits


@cache
def _tell(reason: str) -> None:
    """Once for each reason in a process."""
    logging.getLogger(__name__).warning("tokens are made operation by operation, which is slower: %s", reason)


def recorder(native: Any, device: torch.device, *, alone: bool) -> Record | None:
    """What records steps of a model on a device; None on a CPU, where several processes compute together (`alone`
    False), for int8, which waits for the GPU in every layer, and where fast paths are turned off.
    """
    if device.type != "cuda" or not alone or not environment.own_kernels_wanted():
        return None
    if getattr(native, "is_loaded_in_8bit", False):
        return None
    return Recorder(device)
