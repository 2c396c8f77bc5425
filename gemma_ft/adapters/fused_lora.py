"""PEFT's LoRA layers with a forward of their own: x Wᵀ + s (x Aᵀ) Bᵀ as one autograd function.

PEFT casts x to the adapter's float32, multiplies there and keeps the cast input for backward; here all products are in
x's dtype, as autocast has them, and x itself is all that is kept beside x Aᵀ. The layers are PEFT's in every other way:
names, files, merging, disabling. Switched off, the product with the frozen weight stays the one that it was, to the
bit: a base is what its fresh adapter is. Where a layer is not plain LoRA (dropout, DoRA, bias, several adapters,
merged, int8) PEFT's own forward runs.

Letters: M rows, I input and O output features, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gemma_ft.adapters.frozen_linear import frozen_linear, frozen_product, plain
from gemma_ft.kernels.add_lora import add_lora_reference, lora_implementation, scaled_product
from gemma_ft.kernels.fused_decode import LinearParts
from gemma_ft.kernels.gemv import unhooked
from gemma_ft.kernels.matmul import times, transposed_times


def fused_lora(
    x: Tensor,
    weight: Tensor,
    state: Any | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    training: bool = False,
) -> Tensor:
    """x [..., I] -> [..., O] in x.dtype. `weight` [O, I], or NF4 bytes with bitsandbytes' QuantState; it is frozen.
    lora_a [R, I] and lora_b [O, R] in any dtype; their gradients have it. `training`: compute as if a gradient was
    asked for, also of an adapter that has none.
    """
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = _FusedLora.apply(rows, weight, state, lora_a, lora_b, scaling, training)
    return out.view(*x.shape[:-1], lora_b.shape[0])  # out here: a view that a function returns cannot be written to


class _FusedLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        state: Any | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        training: bool,
    ) -> Tensor:
        answers = not (training or any(ctx.needs_input_grad))
        if answers and (chosen := lora_implementation(x, lora_a, lora_b)).name != "torch":
            x = x.contiguous()
            out = frozen_product(x, weight, state)
            chosen.run(x, lora_a, lora_b, scaling, out)
            return out
        out = frozen_product(x, weight, state)  # [M, O]
        # a and b in x.dtype, kept for backward: a cast is small, and takes a launch on a GPU
        a, b, low = add_lora_reference(x, lora_a, lora_b, scaling, out)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.state, ctx.scaling, ctx.dtypes = state, scaling, (lora_a.dtype, lora_b.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        grad_low = scaled_product(upstream, b, ctx.scaling)  # [M, R]
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = times(upstream, plain(weight, ctx.state, x.dtype))
            grad_x.addmm_(grad_low, a)
        if ctx.needs_input_grad[3]:
            grad_a = transposed_times(grad_low, x, ctx.dtypes[0])
        if ctx.needs_input_grad[4]:
            grad_b = transposed_times(upstream, low, ctx.dtypes[1])
        return grad_x, None, None, grad_a, grad_b, None, None


def lora_or_base(layer: Any, name: str, x: Tensor, state: Any | None) -> Tensor:
    """What a layer of PEFT's whose one adapter is `name` makes of x [..., I]; without it where adapters are off."""
    weight = layer.base_layer.weight
    if layer.disable_adapters:
        return frozen_linear(x, weight, state)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return fused_lora(x, weight, state, a, b, layer.scaling[name], training=layer.training)


def only_adapter(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The name of a layer's one adapter, on or off, where the layer computes what `fused_lora` does; else None."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if args or kwargs or layer.merged or len(active) != 1:
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


def lora_parts(layer: Any, state: Any | None = None) -> LinearParts | None:
    """What one of PEFT's layers computes when it decodes, in one piece; None where that cannot be said. `state`: the
    QuantState of its base layer, where that is in 4 bits.
    """
    base = layer.base_layer
    if base.bias is not None or not unhooked(base):
        return None
    if layer.disable_adapters or layer.merged:  # both: PEFT unmerges in its forward
        return None if layer.disable_adapters and layer.merged else LinearParts(base.weight, state)
    name = only_adapter(layer, base.weight, (), {})
    if name is None:
        return None
    return LinearParts(base.weight, state, (layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]))
