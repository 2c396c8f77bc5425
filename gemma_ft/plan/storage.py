"""Bytes in which weights, keys and values lie in memory, by kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from gemma_ft.plan.shape import Shape
from gemma_ft.system.limits import FIRST_PLACES, MOMENT_BLOCK, SMALLEST_IN_8BIT

Kind = Literal["bf16", "float32", "int8", "nf4"]
BYTES = {"bf16": 2, "float32": 4}
NF4_BLOCK, SCALE_BLOCK = 64, 256  # weights that share a scale, scales that share one; bitsandbytes' defaults


def linear_bytes(rows: int, columns: int, kind: Kind, *, double_quant: bool = True) -> int:
    """Bytes of one linear layer's weight with everything it is read with.

    nf4: half a byte a weight and a scale for each block of 64: float32, or with `double_quant` 8 bits and a float32 for
    256 of them; and the tables of codes. int8: a byte a weight, a float32 for each row.
    Source: arXiv:2305.14314 section 3; bitsandbytes functional.QuantState; arXiv:2208.07339.
    """
    weights = rows * columns
    if kind == "int8":
        return weights + 4 * rows
    if kind != "nf4":
        return weights * BYTES[kind]
    blocks, codes = -(-weights // NF4_BLOCK), 16 * 4
    if not double_quant:
        return -(-weights // 2) + 4 * blocks + codes
    return -(-weights // 2) + blocks + 4 * -(-blocks // SCALE_BLOCK) + codes + 256 * 4 + 4


def layer_bytes(shape: Shape, kind: Kind, *, double_quant: bool = True) -> int:
    """Bytes of the linear layers of one decoder layer."""
    return sum(linear_bytes(rows, columns, kind, double_quant=double_quant) for rows, columns in shape.linears.values())


def weight_bytes(shape: Shape, kind: Kind, *, double_quant: bool = True, rest: Kind = "bf16") -> int:
    """Bytes of a whole model: its linear layers as `kind`; where that is nf4 or int8, embedding and norms as `rest`."""
    rest = rest if kind in ("nf4", "int8") else kind
    others = (shape.embedding + shape.norm_weights) * BYTES[rest]
    return shape.layers * layer_bytes(shape, kind, double_quant=double_quant) + others


def moment_bytes(tensors: Mapping[int, int], optimizer: str) -> int:
    """Bytes of what an optimizer keeps for tensors of these sizes, so many of each: AdamW two moments, Lion one; in 8
    bits a byte for each number, a float32 for each block, and the map of codes.

    Source: kernels.optimizer_step.new_moments.
    """
    moments = 1 if optimizer == "lion8bit" else 2

    def one(size: int) -> int:
        if optimizer == "adamw" or size < SMALLEST_IN_8BIT:
            return moments * 4 * size
        return moments * (size + 4 * -(-size // MOMENT_BLOCK) + 4 * 256)

    return sum(count * one(size) for size, count in tensors.items())


def cache_bytes(shape: Shape, tokens: int, *, rows: int = 1, limit: int | None = None, element: int = 2) -> int:
    """Bytes of keys and values of `rows` sequences of so many tokens, as model.kv_cache holds them: a ring in each
    layer, doubled up to `limit` (None: the model's longest sequence), or the window of a local layer.
    """
    longest = limit or shape.max_positions
    places = 0
    for window in shape.windows:
        most, grown = min(window or longest, longest), FIRST_PLACES
        while grown < tokens:
            grown *= 2
        places += min(most, grown)
    return rows * places * 2 * shape.kv_heads * shape.head_dim * element
