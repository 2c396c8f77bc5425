"""bitsandbytes' 4-bit layer with our product, or with its packed one. Imported only where a model has such layers."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

from gemma_ft.adapters.frozen_linear import frozen_linear, state_of
from gemma_ft.errors import UserError
from gemma_ft.kernels.fused_decode import LinearParts
from gemma_ft.kernels.nf4 import nf4_implementation


class UnpackedLinear4bit(Linear4bit):
    """bitsandbytes' layer whose weight stays as it was quantized: it can be asked, trained through and merged at any
    time, and is faster in all of it on a CPU than packed or dequantized by bitsandbytes (benchmarks/results); on a GPU
    few rows read it as it is, and not bitsandbytes' single row alone.
    """

    def __init__(self, layer: Linear4bit) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(layer.__dict__)
        self.support_avx512bf16_for_cpu = False

    def forward(self, x: Tensor) -> Tensor:
        state = state_of(self)
        if self.bias is not None or self.compute_dtype not in (None, state.dtype):
            found: Tensor = super().forward(x)
            return found
        return frozen_linear(x.to(state.dtype), self.weight, state).to(x.dtype)

    def linear_parts(self) -> LinearParts | None:
        """The layer as a model that decodes takes it; None where `forward` is bitsandbytes' own."""
        state = state_of(self)
        own = self.bias is None and self.compute_dtype in (None, state.dtype)
        return LinearParts(self.weight, state) if own else None


class _WithoutGradient(torch.autograd.Function):
    """(out, x) -> out, for an `out` that was made of x and does not know it."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor) -> Tensor:
        ctx.mark_dirty(out)  # the same tensor, so that what is added to it in place is seen
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        raise UserError(
            "4-bit weights that have answered are packed for this CPU, and pass no gradient; load the model with "
            "GemmaForCausalLM.from_pretrained to train it"
        )


class PackedLinear4bit(Linear4bit):
    """bitsandbytes' layer that packs its weight when it is first asked, and refuses what it then would leave out of a
    backward without a word.
    """

    def __init__(self, layer: Linear4bit) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(layer.__dict__)
        self.support_avx512bf16_for_cpu = True

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        asked = x.requires_grad and torch.is_grad_enabled()
        if asked and getattr(state_of(self), "packing_format_for_cpu", False):
            out = _WithoutGradient.apply(out.detach(), x)
        return out


def keep_unpacked(model: nn.Module) -> int:
    """Give the NF4 layers of a model the product above, where our operations read their weights; returns how many got
    it.
    """
    found = [(name, one) for name, one in model.named_modules() if type(one) is Linear4bit and _suits(one)]
    for name, layer in found:
        model.set_submodule(name, UnpackedLinear4bit(layer))
    return len(found)


def _suits(layer: Linear4bit) -> bool:
    weight = layer.weight
    known = isinstance(weight, Params4bit) and weight.quant_state is not None
    return known and nf4_implementation(weight.data, weight.quant_state).name != "torch"
