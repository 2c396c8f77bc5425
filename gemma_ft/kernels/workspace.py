"""Memory that is kept between uses: pages taken anew from the system cost several times what filling them does."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache
from math import prod

import torch
from torch import Tensor


class Workspace(threading.local):
    """A tensor on the CPU for each name, of each thread its own, as large as the largest that was asked for; the next
    use of a name writes over it.
    """

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of that shape and dtype, filled with anything."""
        size, buffer = prod(shape), self.buffers.get(name)
        if buffer is None or buffer.dtype != dtype or buffer.numel() < size:
            with torch.inference_mode(mode=False):
                buffer = self.buffers[name] = torch.empty(size, dtype=dtype)
        return buffer[:size].view(tuple(shape))


@cache
def workspace() -> Workspace:
    """The one of this process: who takes memory of it has a name of its own for each use."""
    return Workspace()
