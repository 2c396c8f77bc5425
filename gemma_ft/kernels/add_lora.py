"""What LoRA adds to a product: out + s (x Aᵀ) Bᵀ.

Letters: M rows, I input and O output features, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_ft.kernels.backend import Implementation, implementation_of
from gemma_ft.kernels.gemv import MOST_ROWS


def lora_implementation(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Implementation:
    """What adds LoRA to a product of rows x [M, I] that nobody asks a gradient of: something else than the reference
    for few rows on a GPU, as decoding has them, where each of the reference's casts would be a launch for every token.
    """
    chosen = implementation_of("lora_gemv", x)
    if chosen.name == "torch":
        return chosen
    fits = 0 < len(x) <= MOST_ROWS and lora_a.is_contiguous() and lora_b.is_contiguous()
    return implementation_of("lora_gemv", lora_a, lora_b, fits=fits)


def add_lora_reference(
    x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds scaling · x lora_aᵀ lora_bᵀ to `out` [M, O]; returns what backward needs: both weights in x.dtype, and
    scaling · x lora_aᵀ [M, R].

    x [M, I], lora_a [R, I], lora_b [O, R].
    """
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    low = scaled_product(x, a.T, scaling)
    out.addmm_(low, b.T)
    return a, b, low


def scaled_product(x: Tensor, y: Tensor, scaling: float) -> Tensor:
    """scaling · x y, in one operation."""
    out = torch.empty(len(x), y.shape[1], dtype=x.dtype, device=x.device)
    return out.addmm_(x, y, beta=0, alpha=scaling)  # beta 0: what lies in `out` is not read
