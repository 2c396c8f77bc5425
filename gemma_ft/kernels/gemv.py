"""A linear layer's product for as few rows as decoding has: limited by the reading of the weight.

Letters: M rows, I input and O output features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from gemma_ft.kernels.backend import implementation_of

MOST_ROWS = 16  # up to which torch has the weight first
OWN_ROWS = 12  # up to which the C++ is faster than either product of torch (benchmarks/results/products.json)
TOGETHER, LANES = 2, 32  # rows of the weight, and numbers of a row, that cpp/gemv.h takes at a time
MOST_INPUTS, BLOCK = 65536, 64  # numbers of a row that it takes, and of a block with a scale of its own


def unhooked(module: nn.Module) -> bool:
    """Whether nothing is called around a module's forward: else its product may not be taken past it."""
    hooks = module._forward_hooks or module._forward_pre_hooks or _has_any_global_hook()
    return not hooks and "forward" not in vars(module)  # accelerate's hooks replace it


def are_few(x: Tensor, rows: int) -> bool:
    """Whether x, of so many rows, is what this is for: few rows in bf16 on a CPU."""
    return 0 < rows <= MOST_ROWS and x.device.type == "cpu" and x.dtype == torch.bfloat16


def fits(rows: int, shape: tuple[int, ...] | torch.Size, block: int = BLOCK) -> bool:
    """Whether so many rows and a weight [O, I], in 4 bits in blocks of `block`, are what the operation takes."""
    whole = shape[0] % TOGETHER == 0 and shape[1] % LANES == 0 and block % BLOCK == 0
    return whole and 0 < rows <= OWN_ROWS and shape[1] <= MOST_INPUTS


def gemv(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, I] and weight [O, I] in bf16 on the CPU -> x weightᵀ [M, O], without a gradient.

    torch takes a third longer with x first in the product, and for up to OWN_ROWS longer than the C++ does.
    """
    served = fits(len(x), weight.shape) and weight.is_contiguous()
    found: Tensor = implementation_of("gemv", x, weight, fits=served).run(x, weight)
    return found


def weight_first(x: Tensor, weight: Tensor) -> Tensor:
    """The same in torch."""
    if len(x) == 1:
        out = torch.empty(1, len(weight), dtype=x.dtype)
        torch.mv(weight, x[0], out=out[0])
        return out
    return (weight @ x.T).T.contiguous()  # no view, which what an autograd function returns may not be
