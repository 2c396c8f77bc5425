"""The product of few rows with an NF4 weight in Triton: the weight is read in 4 bits and unpacked within the product.

Letters: M rows, I input and O output features.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemma_ft.kernels.triton import nf4

MOST_ROWS = 16  # what a tensor core takes; fewer are filled up with zeros, so that no row's result depends on others
OUTPUTS, WARPS = 32, 4  # of a program: eight outputs for each warp, the fewest that a tensor core takes
TILES = {torch.bfloat16: 128, torch.float32: 64}  # inputs at a time; in float32 the registers hold no more of them
# Over how many programs a weight is spread. Each of a GPU's hundred and more multiprocessors must run several to be
# kept reading, and a layer may have as few as 32 blocks of OUTPUTS: its inputs are split too. With more splits the sums
# that they write would not be small beside the weight. The same on every card, so that a row's result is.
PROGRAMS, MOST_SPLITS = 640, 10
ADDED = 256  # sums of a program that adds the splits


@triton.jit
def _asked(bytes_at, scales_at, tile, last, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """A tile's bytes [O, TILE / 2] and its blocks' scales [O, groups], as they are stored; zeros past the last tile."""
    both = tl.load(bytes_at + tile * (TILE // 2), mask=tile < last, other=0, eviction_policy="evict_first")
    return both, tl.load(scales_at + tile * TILE // BLOCK, mask=tile < last, other=0)


@triton.jit
def _unpacked(code, index, scale, DTYPE: tl.constexpr):
    """Indices [O, bytes] and scales [O, groups] -> weights [bytes, O], rounded as bitsandbytes rounds them."""
    SIZE: tl.constexpr = index.shape[0]
    BYTES: tl.constexpr = index.shape[1]
    GROUPS: tl.constexpr = scale.shape[1]
    found = tl.reshape(tl.load(code + index.to(tl.int32)), (SIZE, GROUPS, BYTES // GROUPS)) * scale[:, :, None]
    return tl.trans(tl.reshape(found.to(DTYPE), (SIZE, BYTES)))


@triton.jit
def _added(total, given, both, scale, code, DTYPE: tl.constexpr):
    """total [16, O] and a tile's products. A byte's high bits are the weight of an even input, its low bits that of the
    odd one after it: they are multiplied apart, so that no weights have to be interleaved.
    """
    even, odd = tl.split(tl.reshape(given, (16, given.shape[1] // 2, 2)))
    total = tl.dot(even, _unpacked(code, both >> 4, scale, DTYPE), total, input_precision="ieee")
    return tl.dot(odd, _unpacked(code, both & 15, scale, DTYPE), total, input_precision="ieee")


@triton.jit
def _scales(
    stored, at, tile, last, code2, absmax2, offset, BLOCK: tl.constexpr, BLOCK2: tl.constexpr, TILE: tl.constexpr
):
    """The scales of double quantization, in the two steps that bitsandbytes rounds."""
    of_many = tl.load(absmax2 + (at + tile * TILE // BLOCK) // BLOCK2, mask=tile < last, other=0.0)
    return tl.load(code2 + stored.to(tl.int32)) * of_many + tl.load(offset)


@triton.jit(do_not_specialize=["rows", "tiles"])  # one kernel for every number of rows
def _products(
    x, packed, absmax, code, code2, absmax2, offset, out, rows, outputs, inputs, tiles,
    NESTED: tl.constexpr, BLOCK: tl.constexpr, BLOCK2: tl.constexpr, OUTPUTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    o, row = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, 16)[:, None]
    x_at = x + row * inputs + tl.arange(0, TILE)[None, :]
    bytes_at = packed + o.to(tl.int64)[:, None] * (inputs // 2) + tl.arange(0, TILE // 2)[None, :]
    GROUPS: tl.constexpr = TILE // BLOCK if TILE > BLOCK else 1
    block = o[:, None] * (inputs // BLOCK) + tl.arange(0, GROUPS)[None, :]
    first = tl.program_id(1) * tiles
    last = tl.minimum(first + tiles, inputs // TILE)
    total = tl.zeros((16, OUTPUTS), tl.float32)
    # Two tiles are asked for before the first is used: more would take the registers of another program. By hand, for
    # Triton's own stages would also ask for the code's values ahead, and take them through shared memory one by one.
    for tile in tl.range(first, last, 2, num_stages=1):
        both, scale = _asked(bytes_at, absmax + block, tile, last, BLOCK, TILE)
        next_both, next_scale = _asked(bytes_at, absmax + block, tile + 1, last, BLOCK, TILE)
        if NESTED:
            scale = _scales(scale, block, tile, last, code2, absmax2, offset, BLOCK, BLOCK2, TILE)
            next_scale = _scales(next_scale, block, tile + 1, last, code2, absmax2, offset, BLOCK, BLOCK2, TILE)
        given = tl.load(x_at + tile * TILE, mask=row < rows, other=0.0)
        total = _added(total, given, both, scale, code, x.dtype.element_ty)
        given = tl.load(x_at + (tile + 1) * TILE, mask=(row < rows) & (tile + 1 < last), other=0.0)
        total = _added(total, given, next_both, next_scale, code, x.dtype.element_ty)
    to = out + (tl.program_id(1) * rows + row) * outputs + o[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=row < rows)


@triton.jit(do_not_specialize=["count"])
def _sum(parts, out, count, SPLITS: tl.constexpr, ADDED: tl.constexpr):
    at = tl.program_id(0) * ADDED + tl.arange(0, ADDED)
    total = tl.zeros((ADDED,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + split * count + at, mask=at < count, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < count)


def gemv_nf4(x: Tensor, packed: Tensor, state: Any) -> Tensor:
    """x [M, I] times the weight transposed -> [M, O] in x.dtype: products of weights as bitsandbytes dequantizes them,
    added in float32 and rounded once. Only where it `takes` them.

    packed: bitsandbytes' NF4 bytes, of which `state` is its QuantState. Nothing waits for the GPU, and what is started
    depends on shapes alone: a CUDA graph may hold it. Source: arXiv:2305.14314; bitsandbytes functional.py.
    """
    (outputs, inputs), rows, tile = state.shape, len(x), TILES[x.dtype]
    splits, tiles = _splits(outputs // OUTPUTS, inputs // tile)
    out = x.new_empty((rows, outputs))
    parts = out if splits == 1 else x.new_empty((splits, rows, outputs), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _products[(outputs // OUTPUTS, splits)](
            x, nf4.bytes_of(packed), *nf4.scales_of(state), parts, rows, outputs, inputs, tiles,
            *nf4.blocks_of(state), OUTPUTS, tile,
            num_warps=WARPS, enable_fp_fusion=False,  # a scale is rounded before the offset is added to it
        )  # fmt: skip
        if splits > 1:
            _sum[(triton.cdiv(out.numel(), ADDED),)](parts, out, out.numel(), splits, ADDED)
    return out


def _splits(blocks: int, tiles: int) -> tuple[int, int]:
    """Into how many parts the inputs are split, and the tiles of each: an even number, as a program takes two."""
    wanted = max(1, min(PROGRAMS // blocks, MOST_SPLITS))
    each = 2 * triton.cdiv(tiles, 2 * wanted)
    return triton.cdiv(tiles, each), each


def fits(x: Tensor, state: Any) -> bool:
    """Whether so many rows [M, I], and a weight of that shape, are what `gemv_nf4` takes."""
    outputs, inputs = state.shape
    whole = outputs % OUTPUTS == 0 and inputs % TILES.get(x.dtype, inputs + 1) == 0
    return whole and 0 < len(x) <= MOST_ROWS and x.shape[1] == inputs


def takes(x: Tensor, packed: Tensor, state: Any) -> bool:
    """Whether `gemv_nf4` takes these rows and this weight."""
    return nf4.takes(packed, state) and fits(x, state)
