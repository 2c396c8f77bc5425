"""The fused LoRA layer over bitsandbytes' 4-bit weights; apart, because PEFT has its layer only where that is
installed.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor

from gemma_ft.adapters.frozen_linear import state_of
from gemma_ft.adapters.fused_lora import lora_or_base, lora_parts, only_adapter
from gemma_ft.kernels.fused_decode import LinearParts


class FusedLinear4bit(Linear4bit):
    """PEFT's LoRA on a Linear4bit: the weight is dequantized once in forward and once in backward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name, base = only_adapter(self, x, args, kwargs), self.base_layer
        state = state_of(base)
        if name is None or state is None or getattr(state, "packing_format_for_cpu", False) or self._will_pack(x):
            return super().forward(x, *args, **kwargs)
        if base.compute_dtype is not None and base.compute_dtype != x.dtype:
            return super().forward(x, *args, **kwargs)
        return lora_or_base(self, name, x, state)

    def linear_parts(self) -> LinearParts | None:
        """See `lora_parts`."""
        base = self.base_layer
        state = state_of(base)
        return lora_parts(self, state) if state is not None and base.compute_dtype in (None, state.dtype) else None

    def _will_pack(self, x: Tensor) -> bool:
        """Whether bitsandbytes would pack the weight in this forward: its layer decides (adapters/quantize.py)."""
        base = self.base_layer
        return x.device.type == "cpu" and base.support_avx512bf16_for_cpu and not base.training and not x.requires_grad
