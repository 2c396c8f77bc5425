"""A pass that decodes, one token of each sequence, through all layers at once, where nothing about the model is out of
the ordinary; elsewhere its layers run as they are, one operation after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gemma_ft.kernels.backend import implementation_of
from gemma_ft.kernels.fused_decode import HEAD_NORMS, NORMS, LayerDescriptor, LinearParts
from gemma_ft.kernels.gemv import LANES, MOST_ROWS, TOGETHER, unhooked
from gemma_ft.model.kv_cache import KVPass
from gemma_ft.model.layers import GemmaAttention, GemmaDecoderLayer, GemmaMLP, GemmaRMSNorm
from gemma_ft.model.linear import is_plain


def decoded(model: Any, x: Tensor, angles: Sequence[tuple[Tensor, Tensor]], one: KVPass) -> Tensor | None:
    """x [B, 1, D], what the first of a GemmaModel's layers is given in a pass of single tokens -> what the last one
    gives, the keys and values in the cache of the pass; None where the layers are to do it. angles: of each layer.
    """
    config = model.config
    asked = torch.is_grad_enabled() or model.training or config._attn_implementation == "eager"
    fits = not asked and len(x) <= MOST_ROWS and config.head_dim % LANES == 0
    chosen = implementation_of("fused_decode", x, fits=fits)
    if chosen.name == "torch":
        return None
    windows = [window or one.cache.max_seq_len for window in model.numerics.window_tokens]
    held = [(limit, window) for limit, window in zip(one.cache.limits, windows, strict=True)]
    if any(limit < TOGETHER or limit > window for limit, window in held):  # keys are read two by two, and all of them
        return None
    if x.shape[:2] != one.position_ids.shape:
        return None
    kept: list[LayerDescriptor] = one.cache.kept or [LayerDescriptor() for _ in model.layers]
    with torch._C.DisableTorchFunctionSubclass():  # addresses and shapes alone are asked for, hundreds of times
        if not all(_describe_layer(layer, into, x.dtype) for layer, into in zip(model.layers, kept, strict=True)):
            return None
    angles = [(cos.contiguous(), sin.contiguous()) for cos, sin in angles]  # held until they have been read
    like = x.new_empty(()).expand(len(x), config.num_key_value_heads, 1, config.head_dim)
    for index, into in enumerate(kept):
        keys, values = one.rings(index, like)
        if keys.dtype != x.dtype:
            return None
        into.set_cache(keys, values, one.cache.limits[index])
        into.set_angles(*angles[index])
    one.cache.kept = kept
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    scale, softcap = model.numerics.query_scale, model.numerics.attn_softcap
    found = chosen.run(x[:, 0], kept, one.starts, heads=heads, eps=config.rms_norm_eps, scale=scale, softcap=softcap)
    last: Tensor = found[:, None]
    return last


def _describe_layer(layer: Any, into: LayerDescriptor, dtype: torch.dtype) -> bool:
    """Whether a layer, as it is now, was put into words for C++."""
    attention, mlp = layer.self_attn, layer.mlp
    if (type(layer), type(attention), type(mlp)) != (GemmaDecoderLayer, GemmaAttention, GemmaMLP):
        return False
    norms: dict[str, Any] = dict.fromkeys(NORMS)
    norms |= zip(HEAD_NORMS, (attention.q_norm, attention.k_norm), strict=True)
    norms["before_attention"] = layer.input_layernorm
    norms["before_mlp"] = getattr(layer, layer.pre_mlp_norm)
    if layer.sandwich_norms:
        norms["after_attention"], norms["after_mlp"] = layer.post_attention_layernorm, layer.post_feedforward_layernorm
    hidden, middle = attention.config.hidden_size, attention.config.intermediate_size
    queries, keys = (
        attention.head_dim * count
        for count in (attention.config.num_attention_heads, attention.config.num_key_value_heads)
    )
    linears = {
        "q": (attention.q_proj, (queries, hidden)),
        "k": (attention.k_proj, (keys, hidden)),
        "v": (attention.v_proj, (keys, hidden)),
        "o": (attention.o_proj, (hidden, queries)),
        "gate": (mlp.gate_proj, (middle, hidden)),
        "up": (mlp.up_proj, (middle, hidden)),
        "down": (mlp.down_proj, (hidden, middle)),
    }
    return (
        all(unhooked(module) for module in (layer, attention, mlp))
        and all(_describe_norm(name, norm, into, dtype) for name, norm in norms.items())
        and all(_describe_linear(name, *one, into, dtype) for name, one in linears.items())
    )


def _describe_norm(name: str, norm: Any, into: LayerDescriptor, dtype: torch.dtype) -> bool:
    if norm is None:
        return into.set_norm(name, None, dtype)
    return type(norm) is GemmaRMSNorm and unhooked(norm) and into.set_norm(name, norm.weight, dtype)


def _describe_linear(name: str, module: Any, shape: tuple[int, int], into: LayerDescriptor, dtype: torch.dtype) -> bool:
    parts = linear_parts(module)
    return parts is not None and into.set_linear(name, parts, dtype, shape)


def linear_parts(module: Any) -> LinearParts | None:
    """What a linear layer computes, where that can be said: of torch's own, or of one that says it itself."""
    if is_plain(module):
        return LinearParts(module.weight)
    said = getattr(module, "linear_parts", None)
    return said() if said is not None and unhooked(module) else None
