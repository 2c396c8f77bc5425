"""A CUDA graph without CUDA: operations are written down with the very tensors that they met, and repeated on those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class _Written(TorchDispatchMode):
    """Python's numbers are kept as they were, results keep their place in memory, and nothing is read back."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("called a synchronizing CUDA operation\nand more")
        found = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, found))
        return found

    def repeat(self) -> None:
        for func, args, kwargs, found in self.calls:
            if _is_view(func):
                continue
            again = func(*args, **kwargs)
            if func._schema.is_mutable:
                continue
            for old, new in zip(tree_flatten(found)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)


def _is_view(func: Any) -> bool:
    return any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.arguments)


class Emulated:
    """A recorder as gemma_ft.kernels.triton.cuda_graph.Recorder is one; `recorded` counts what it was given."""

    def __init__(self) -> None:
        self.recorded = self.repeated = 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        run()
        with _Written() as written:
            given = run()
        self.recorded += 1

        def repeat() -> None:
            self.repeated += 1
            given.fill_(float("nan"))
            written.repeat()

        return repeat, given
