"""PEFT's LoRA layers with a forward of their own: x Wᵀ + s (x Aᵀ) Bᵀ as one autograd function.

PEFT casts x to the adapter's float32, multiplies there and keeps the cast input for backward; here all products are in
x's dtype, as autocast has them, and x itself is all that is kept beside x Aᵀ. The layers are PEFT's in every other way:
names, files, merging, disabling. Where a layer is not plain LoRA (dropout, DoRA, bias, several adapters, merged, int8)
PEFT's own forward runs.

Letters: M rows, I input and O output features, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gemma_ft import runtime
from gemma_ft.adapters.frozen_linear import frozen_product, plain
from gemma_ft.kernels.few_rows import unhooked


def with_fused_layers(config: LoraConfig) -> LoraConfig:
    """`config`, so that PEFT makes fused layers out of linear ones, through its own registry of custom layers;
    unchanged where the user asks for plain ones.
    """
    if not runtime.own_kernels_wanted():
        return config
    config._register_custom_module({nn.Linear: _layer})
    return config


def fused_lora(x: Tensor, weight: Tensor, state: Any | None, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """x [..., I] -> [..., O] in x.dtype. `weight` [O, I], or NF4 bytes with bitsandbytes' QuantState; it is frozen.
    lora_a [R, I] and lora_b [O, R] in any dtype; their gradients have it.
    """
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = _FusedLora.apply(rows, weight, state, lora_a, lora_b, scaling)
    return out.view(*x.shape[:-1], lora_b.shape[0])  # out here: a view that a function returns cannot be written to


class _FusedLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, state: Any | None, lora_a: Tensor, lora_b: Tensor, scaling: float
    ) -> Tensor:
        low = x @ lora_a.to(x.dtype).T  # [M, R]
        out = frozen_product(x, weight, state)  # [M, O]
        out.addmm_(low, lora_b.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(x, weight, lora_a, lora_b, low)
        ctx.state, ctx.scaling = state, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_a, lora_b, low = ctx.saved_tensors
        grad_low = (upstream @ lora_b.to(x.dtype)).mul_(ctx.scaling)  # [M, R]
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = upstream @ plain(weight, ctx.state, x.dtype)
            grad_x.addmm_(grad_low, lora_a.to(x.dtype))
        if ctx.needs_input_grad[3]:
            grad_a = (grad_low.T @ x).to(lora_a.dtype)
        if ctx.needs_input_grad[4]:
            grad_b = (low.T @ upstream).T.to(lora_b.dtype, copy=True).mul_(ctx.scaling)
        return grad_x, None, None, grad_a, grad_b, None


class FusedLinear(Linear):
    """PEFT's LoRA on an nn.Linear."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = only_adapter(self, x, args, kwargs)
        if name is None or self.base_layer.weight.dtype != x.dtype:
            return super().forward(x, *args, **kwargs)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return fused_lora(x, self.base_layer.weight, None, a, b, self.scaling[name])


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


def only_adapter(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The name of a layer's one adapter, where the layer computes what `fused_lora` does; else None."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if args or kwargs or layer.disable_adapters or layer.merged or len(active) != 1:
        return None
    (name,) = active
    base, a, b = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
    plain = (
        name not in layer.lora_variant
        and (isinstance(layer.lora_dropout[name], nn.Identity) or not layer.training)
        and base.bias is None
        and b.bias is None
        and not torch.is_autocast_enabled(x.device.type)
        and all(unhooked(one) and one.weight.device == x.device for one in (base, a, b))
        and not base.weight.requires_grad
        and torch.promote_types(x.dtype, a.weight.dtype) == a.weight.dtype
    )
    return name if plain else None
