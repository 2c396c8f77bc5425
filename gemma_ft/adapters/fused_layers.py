"""PEFT's LoRA layers with the fused forward, and how PEFT comes to make them."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftConfig
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from gemma_ft.adapters.fused_lora import lora_or_base, lora_parts, only_adapter
from gemma_ft.kernels.fused_decode import LinearParts
from gemma_ft.system import environment


def with_fused_layers(config: PeftConfig) -> PeftConfig:
    """`config`, so that PEFT makes fused layers out of linear ones, through its own registry of custom layers;
    unchanged where the user asks for plain ones, and where it makes none.
    """
    if not environment.own_kernels_wanted() or not isinstance(config, LoraConfig):
        return config
    config._register_custom_module({nn.Linear: _layer})
    return config


class FusedLinear(Linear):
    """PEFT's LoRA on an nn.Linear."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = only_adapter(self, x, args, kwargs)
        if name is None or self.base_layer.weight.dtype != x.dtype:
            return super().forward(x, *args, **kwargs)
        return lora_or_base(self, name, x, None)

    def linear_parts(self) -> LinearParts | None:
        """See `lora_parts`."""
        return lora_parts(self)


def _layer(target: nn.Module, adapter_name: str, *, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """What PEFT puts in place of `target`: a fused layer, or None for what it shall make itself."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if type(base) is nn.Linear and not config.fan_in_fan_out:
        return FusedLinear(target, adapter_name, config=config, **kwargs)
    if kwargs.get("loaded_in_4bit") and not kwargs.get("loaded_in_8bit"):
        from bitsandbytes.nn import Linear4bit

        if isinstance(base, Linear4bit):
            from gemma_ft.adapters.fused_lora_4bit import FusedLinear4bit

            return FusedLinear4bit(target, adapter_name, config=config, **kwargs)
    return None
