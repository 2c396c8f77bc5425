"""Linear layers, of a model that only answers: as many rows as a prompt has, or as few as a token, and no gradient; and
how it stays one that can be trained. In training mode a layer computes the same with a gradient and without, to the
bit: what a policy is compared with is a pass of the same weights without one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gemma_ft.kernels.gemv import are_few, gemv, unhooked
from gemma_ft.kernels.matmul import MANY, times_transposed
from gemma_ft.kernels.trained_linear import takes_trained, trained_linear


def linear(layer: Any, x: Tensor) -> Tensor:
    """layer(x), by the product that is fastest for so many rows, where the layer is no more than its weight; under
    autocast as `trained_linear` has it.
    """
    if is_plain(layer) and takes_trained(x, layer.weight):
        return trained_linear(x, layer.weight)
    rows = x.numel() // x.shape[-1]
    few = are_few(x, rows)
    if not ((few or rows >= MANY) and _serves(layer, x)):
        out: Tensor = layer(x)
        return out
    flat = x.reshape(rows, -1)
    found = gemv(flat, layer.weight) if few else times_transposed(flat, layer.weight)
    return found.view(*x.shape[:-1], -1)


def is_plain(layer: Any) -> bool:
    """Whether a layer is no more than its weight."""
    if type(layer) is not nn.Linear or getattr(layer, "bias", None) is not None:
        return False
    return type(layer.weight) is nn.Parameter and unhooked(layer)


def keep_trainable(model: nn.Module) -> int:
    """Have no layer of a model rewrite its frozen weight when it is asked; returns how many would have.

    On CPUs with AVX512-BF16 bitsandbytes' 4-bit layers pack it for speed in the first pass without a gradient, and from
    then on give none to the layers below them, without a word. They do so where this public attribute of theirs says
    so. Source: bitsandbytes 0.50.2 nn/modules.py `Linear4bit.forward`, autograd/_functions.py `matmul_4bit`.
    """
    found: list[Any] = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for module in found:
        module.support_avx512bf16_for_cpu = False
    return len(found)


def _serves(layer: Any, x: Tensor) -> bool:
    """Whether a plain layer's weight is in the dtype of x, and the layer only answers."""
    if not is_plain(layer) or layer.training:
        return False
    weight = layer.weight
    asked = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return (weight.dtype, weight.device) == (x.dtype, x.device) and not asked
