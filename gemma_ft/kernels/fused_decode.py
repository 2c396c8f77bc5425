"""One token of each of a few sequences through all layers of a model, in one call: cpp/decode.h.

What it computes is what the layers in torch compute, rounded where they round (the scores stay float32); the model's
ordinary forward is its reference. It reads weights as they are stored, bf16, float32 or NF4, and LoRA beside them.

Letters: B sequences, D hidden, K key/value heads, H head dim, I input and O output features, R rank.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gemma_ft.kernels import cpp_backend
from gemma_ft.kernels.cpp_backend import F32, I64, P
from gemma_ft.kernels.cpp_operations import nf4_scales
from gemma_ft.kernels.gemv import fits
from gemma_ft.kernels.nf4 import nf4_implementation

LINEAR = ("q", "k", "v", "o", "gate", "up", "down")
NORMS = ("before_attention", "after_attention", "before_mlp", "after_mlp")  # of D numbers
HEAD_NORMS = ("query_norm", "key_norm")  # of the H numbers of each head


class _Linear(ctypes.Structure):
    _fields_ = (
        *((name, P) for name in ("weight", "scales", "scales8", "code2", "scales2", "code", "lora_a", "lora_b")),
        *((name, I64) for name in ("block", "block2", "outputs", "inputs", "rank")),
        *((name, F32) for name in ("offset", "scaling")),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Linear) for name in LINEAR),
        *((name, P) for name in (*NORMS, *HEAD_NORMS, "cos", "sin", "keys", "values")),
        *((name, I64) for name in ("places", "limit")),
    )


class _Shape(ctypes.Structure):
    _fields_ = (
        *((name, I64) for name in ("batch", "hidden", "heads", "key_value_heads", "head_dim", "middle", "layers")),
        *((name, F32) for name in ("eps", "scale", "cap")),
    )


class LinearParts:
    """What a linear layer computes, where that is all: `weight` [O, I], or NF4 bytes with bitsandbytes' QuantState, and
    one LoRA beside it: A [R, I], B [O, R] and their factor.
    """

    __slots__ = ("lora", "state", "weight")

    def __init__(
        self, weight: Tensor, state: Any | None = None, lora: tuple[Tensor, Tensor, float] | None = None
    ) -> None:
        self.weight, self.state, self.lora = weight, state, lora

    def places(self) -> tuple[int, ...]:
        """Where its memory lies: as long as nothing of it is another tensor or lies elsewhere, a description holds."""
        if self.lora is None:
            return (self.weight.data_ptr(),)
        return self.weight.data_ptr(), self.lora[0].data_ptr(), self.lora[1].data_ptr()

    def same(self, other: LinearParts) -> bool:
        """Whether it is made of the same tensors."""
        if self.weight is not other.weight or self.state is not other.state:
            return False
        if self.lora is None or other.lora is None:
            return self.lora is other.lora
        (a, b, factor), (other_a, other_b, other_factor) = self.lora, other.lora
        return a is other_a and b is other_b and factor == other_factor

    def described(self, dtype: torch.dtype) -> _Linear | None:
        """As C++ takes it; None where it does not take it, computing in `dtype`."""
        weight, state = self.weight, self.state
        if state is None:
            served = (
                weight.dtype == dtype and weight.dim() == 2 and weight.is_contiguous() and cpp_backend.serves(weight)
            )
        else:
            served = state.dtype == dtype and nf4_implementation(weight, state).name == "cpp"
        shape = weight.shape if state is None else state.shape
        if not (served and fits(1, shape, *(() if state is None else (state.blocksize,)))):
            return None
        one = _Linear(weight=weight.data_ptr(), outputs=shape[0], inputs=shape[1])
        if state is not None:
            names = ("scales", "scales8", "code2", "scales2", "offset", "code")
            scales, blocks = nf4_scales(state)
            for name, value in zip((*names, "block", "block2"), (*scales, *blocks), strict=True):
                setattr(one, name, value.data_ptr() if isinstance(value, Tensor) else value)
        return self._with_lora(one, shape)

    def _with_lora(self, one: _Linear, shape: torch.Size) -> _Linear | None:
        if self.lora is None:
            return one
        a, b, one.scaling = self.lora
        whole = a.is_contiguous() and b.is_contiguous() and a.dtype == torch.float32 and cpp_backend.serves(a, b)
        if not whole or a.shape[1:] != shape[1:] or b.shape != (shape[0], a.shape[0]):
            return None
        one.lora_a, one.lora_b, one.rank = a.data_ptr(), b.data_ptr(), a.shape[0]
        return one


@dataclass
class LayerDescriptor:
    """A layer as C++ takes it, and what its addresses point at: kept from pass to pass, for making it takes as long as
    a good part of a token.
    """

    layer: _Layer = field(default_factory=_Layer)
    linears: dict[str, tuple[LinearParts, tuple[int, ...]]] = field(default_factory=dict)
    norms: dict[str, tuple[Tensor | None, int | None]] = field(default_factory=dict)

    def set_linear(self, name: str, parts: LinearParts, dtype: torch.dtype, shape: tuple[int, int]) -> bool:
        """Whether linear layer `name` of LINEAR, of shape [O, I], is served; described anew where it changed."""
        before, places = self.linears.get(name), parts.places()
        if before is not None and before[1] == places and before[0].same(parts):
            return True
        described = parts.described(dtype)
        if described is None or (described.outputs, described.inputs) != shape:
            return False
        setattr(self.layer, name, described)
        self.linears[name] = parts, places
        return True

    def set_norm(self, name: str, weight: Tensor | None, dtype: torch.dtype) -> bool:
        """Whether norm `name` of NORMS or HEAD_NORMS with its weight [D] or [H] is served; None: the model has no such
        norm.
        """
        before, place = self.norms.get(name), None if weight is None else weight.data_ptr()
        if before is not None and before[0] is weight and before[1] == place:
            return True
        if weight is not None and not (weight.dtype == dtype and weight.is_contiguous() and cpp_backend.serves(weight)):
            return False
        setattr(self.layer, name, place)
        self.norms[name] = weight, place
        return True

    def set_angles(self, cos: Tensor, sin: Tensor) -> None:
        """Of the pass's rows [B, 1, 1, H], in float32 and contiguous."""
        self.layer.cos, self.layer.sin = cos.data_ptr(), sin.data_ptr()

    def set_cache(self, keys: Tensor, values: Tensor, limit: int) -> None:
        """Keys and values [B, K, places, H] of the pass's rows; at most `limit` places are used."""
        self.layer.keys, self.layer.values = keys.data_ptr(), values.data_ptr()
        self.layer.places, self.layer.limit = keys.shape[2], limit


def decode(
    x: Tensor,
    layers: Sequence[LayerDescriptor],
    starts: Sequence[int],
    *,
    heads: tuple[int, int, int],
    eps: float,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """x [B, D], what the first layer is given -> [B, D], what the last one gives; the new keys and values are put into
    their rings.

    Every layer has taken its parts, which live on. starts: the tokens that each sequence holds before; heads: N, K, H.
    """
    out = x.clone(memory_format=torch.contiguous_format)
    described = (_Layer * len(layers))(*(one.layer for one in layers))
    shape = _Shape(*x.shape, *heads, layers[0].layer.gate.outputs, len(layers), eps, scale, softcap or 0.0)
    cpp_backend.call("decode", ctypes.byref(shape), described, (I64 * len(starts))(*starts), out, of=x.dtype)
    return out
