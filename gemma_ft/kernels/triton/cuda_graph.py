"""Operations recorded once and repeated as a CUDA graph: one launch for all of them."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakSet

import torch
from torch import Tensor

Replay = Callable[[], None]


class Recorder:
    """Records on one GPU, on a stream of its own. Memory is shared among recordings: what one gave is read before
    another is repeated.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # torch's own stream for graphs is one for all: the end of any graph would free what cuBLAS works in for others
        self._stream: torch.cuda.Stream | None = None
        self._alive: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """Run it, and record it: what repeats it, and the tensor that holds what it gives, each time anew.

        Raises: RuntimeError where something in it cannot be recorded, such as waiting for the GPU.
        """
        with torch.cuda.device(self.device):
            here = torch.cuda.current_stream()
            self._stream = self._stream or torch.cuda.Stream()
            run()  # kernels are compiled, and libraries take their memory, before anything is recorded
            _without_waiting(run)
            graph = torch.cuda.CUDAGraph()
            pool = next((one.pool() for one in self._alive), None)  # that of graphs that are gone may not be taken
            try:
                # what other threads do meanwhile, such as those of a server, is no part of it
                with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                    given = run()
            finally:
                torch.cuda.set_stream(here)  # which torch leaves out where recording ends in an error
            self._alive.add(graph)
        return graph.replay, given


def _without_waiting(run: Callable[[], Tensor]) -> None:
    """Run it, with an error where it waits for the GPU: found out while recording, that leaves torch's memory and
    random numbers in a state in which later work fails.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode(before)
