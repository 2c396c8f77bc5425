"""Operations recorded once and repeated as a CUDA graph: one launch for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Replay = Callable[[], None]
WARM_UPS = 2  # kernels are compiled, and libraries take their memory, before anything is recorded


class Recorder:
    """Records on one GPU. Memory is shared among recordings: what one gave is read before another is repeated."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """Run it, and record it: what repeats it, and the tensor that holds what it gives, each time anew.

        Raises: RuntimeError where something in it cannot be recorded, such as waiting for the GPU.
        """
        with torch.cuda.device(self.device):
            aside, here = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                for _ in range(WARM_UPS):
                    run()
            here.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # what other threads do meanwhile, such as those of a server, is no part of it
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                given = run()
            self._pool = graph.pool()
        return graph.replay, given
