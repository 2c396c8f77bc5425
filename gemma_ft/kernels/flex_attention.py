"""Attention on a GPU through torch's FlexAttention: no T x T tensor, and blocks of keys that no query sees are skipped.

Letters: B batch, T tokens, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma_ft.kernels.plain_tensors import DTYPES
from gemma_ft.kernels.triton import triton_backend as gpu
from gemma_ft.system import environment

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

FEW_SCORES = 2**24  # 64 MiB of them in float32
PROBED_TOKENS = 256
BLOCK = 128  # tokens to a side of a block of the mask: FlexAttention's own default
RECOMPILES = 64  # the lengths and batch sizes of a run, with a gradient and without: torch gives up at 8, in its favour

# Tiles of the kernels, as torch chooses them and smaller ones, from the fastest down. At a head dim of 256 torch's own
# take more shared memory than cards of compute capability 8.6, 8.9 and 12.x have (99 KiB):
# https://github.com/pytorch/pytorch/issues/198224, https://github.com/pytorch/pytorch/issues/180278
TILES: tuple[dict[str, int], ...] = (
    {},
    {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 32, "bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 32, "bwd_BLOCK_M2": 32,
     "bwd_BLOCK_N2": 32, "num_stages": 2, "num_warps": 8},
    {"fwd_BLOCK_M": 32, "fwd_BLOCK_N": 16, "bwd_BLOCK_M1": 16, "bwd_BLOCK_N1": 16, "bwd_BLOCK_M2": 16,
     "bwd_BLOCK_N2": 16, "fwd_num_stages": 2, "bwd_num_stages": 1, "num_warps": 4},
)  # fmt: skip


def block_mask(low: Tensor) -> BlockMask:
    """Query t of row b sees the keys low[b, t] .. t: low [B, T], made once for all layers of that kind.

    What a block of BLOCK x BLOCK queries and keys holds follows from the least and the greatest `low` of its queries:
    no T x T tensor is made, and nothing of it is compiled.
    """
    from torch.nn.attention.flex_attention import BlockMask

    low = low.to(torch.int32).contiguous()
    batch, tokens = low.shape
    blocks = -(-tokens // BLOCK)
    more = low[:, -1:].expand(batch, blocks * BLOCK - tokens)
    of_block = torch.cat((low, more), dim=1).view(batch, blocks, BLOCK)
    least, greatest = of_block.amin(dim=2)[..., None], of_block.amax(dim=2)[..., None]  # [B, blocks of queries, 1]
    first = torch.arange(0, blocks * BLOCK, BLOCK, device=low.device, dtype=torch.int32)
    query, key = first[:, None], first  # the first of each block
    seen = (key <= query) & (key + BLOCK > least)
    # all of it is seen: every key is one that the first query has before it, and the last one reaches back to
    whole = (key + BLOCK <= query + 1) & (key >= greatest) & (query + BLOCK <= tokens)

    def is_seen(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (low[b, query] <= key) & (key <= query)

    return BlockMask.from_kv_blocks(
        *_listed(seen & ~whole), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=is_seen, seq_lengths=(tokens, tokens)
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """bool [B, queries, keys] -> how many blocks of keys each block of queries has, [B, 1, queries], and which ones
    they are, first of all, [B, 1, queries, keys].
    """
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(dim=-1, dtype=torch.int32)[:, None].contiguous(), order.int()[:, None].contiguous()


def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, scale: float, softcap: float | None = None,
    tiles: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """softmax(cap(query · keyᵀ · scale), over the keys of `mask`) · value.

    query [B, N, T, H], key and value [B, K, T, H] -> [B, N, T, H]. Compiled once for each kind of shapes on a GPU, and
    kept on the disk by torch; on a CPU every score is written out, which is for tests. `tiles`: one of TILES (None: the
    first that the GPU of these tensors has room for). The reference is attention.eager_attention.
    """
    from torch.nn.attention import flex_attention as torch_flex

    attend: Any = torch_flex.flex_attention
    if _on_gpu(query):
        tiles = fitting(query.device, query.shape[3], query.dtype).tiles if tiles is None else tiles
        attend = _compiled()
        _settle_compiler()
    # without the first option fewer than 128 tokens take another kernel, with tiles of its own, which nothing tried
    options = {"FORCE_USE_FLEX_ATTENTION": True, **(tiles or {})}
    found: Tensor = attend(
        query, key, value, score_mod=_capped(softcap) if softcap else None, block_mask=mask, scale=scale,
        enable_gqa=query.shape[1] != key.shape[1], kernel_options=options,
    )  # fmt: skip
    return found


def _on_gpu(query: Tensor) -> bool:
    return query.is_cuda


def _capped(cap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


@cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention as plain

    environment.keep_compiled()
    return torch.compile(plain, fullgraph=True)  # never the form that writes out every score, without a word


def _settle_compiler() -> None:
    """Asked for at every call: torch keeps such settings for each thread, and backward has one of its own."""
    from torch._dynamo import config

    if config.recompile_limit < RECOMPILES:
        config.recompile_limit = RECOMPILES
    config.specialize_float = True  # else a second cap in a process becomes a symbol, with which it does not compile


@dataclass(frozen=True)
class Fit:
    """What a GPU has room for: one of TILES, None where none runs. `failed`: what the last that did not run said.
    `seconds`: how long compiling and trying took; what was compiled is kept on the disk.
    """

    tiles: dict[str, int] | None
    failed: str
    seconds: float

    def describe(self) -> str:
        """What it came to, for the user."""
        smaller = "" if self.tiles == TILES[0] else " in smaller tiles, for the shared memory of this GPU"
        return f"FlexAttention{smaller}, compiled and tried in {self.seconds:.0f} s, kept on the disk"


@cache
def fitting(device: torch.device, head_dim: int, dtype: torch.dtype) -> Fit:
    """The first of TILES that runs on a GPU, forwards and backwards: whether a card has the shared memory that a head
    dim of 256 takes is known when it was tried.
    """
    failed, begun = "", time.perf_counter()
    for tiles in TILES:
        said = gpu.tried(partial(_step, device, head_dim, dtype, tiles))
        if said is None:
            return Fit(tiles, failed, time.perf_counter() - begun)
        failed = said
    return Fit(None, failed, time.perf_counter() - begun)


def _step(device: torch.device, head_dim: int, dtype: torch.dtype, tiles: dict[str, int]) -> None:
    query, key, value = (
        torch.zeros(1, heads, PROBED_TOKENS, head_dim, dtype=dtype, device=device, requires_grad=True)
        for heads in (2, 1, 1)
    )
    mask = block_mask(torch.zeros(1, PROBED_TOKENS, dtype=torch.int64, device=device))
    flex_attention(query, key, value, mask, scale=1.0, softcap=30.0, tiles=tiles).sum().backward()
    torch.cuda.synchronize(device)


@cache
def reason_against(device: torch.device, head_dim: int, dtype: torch.dtype) -> str | None:
    """Why it does not run on a GPU, in words for the user; None: it does, forwards and backwards."""
    if (against := gpu.reason_against(device, dtype)) is not None:
        return against
    if torch.cuda.get_device_capability(device) < gpu.CAPABILITY:
        return "this GPU is older than FlexAttention"
    fit = fitting(device, head_dim, dtype)
    return None if fit.tiles is not None else f"FlexAttention does not run here ({fit.failed})"


def serves(query: Tensor, *_: Tensor | None) -> bool:
    """Whether a query [B, N, T, H] meets its keys in it: where it runs, and where compiling for T is worth it."""
    if not query.is_cuda or query.shape[2] == 1 or query.dtype not in DTYPES:  # float64 is for laws
        return False
    return reason_against(query.device, query.shape[3], query.dtype) is None


def is_short(query: Tensor) -> bool:
    """Whether a query [B, N, T, H] is a prompt, read in pieces: written out sooner than compiled for its length."""
    batch, heads, tokens, _ = query.shape
    return query.is_cuda and not torch.is_grad_enabled() and batch * heads * tokens**2 <= FEW_SCORES


def verdict(device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> tuple[bool, str]:
    """Whether it runs on a GPU at this head dim, and why, in words for the user. Without one nothing is tried, for
    trying is compiling.
    """
    if head_dim is None:
        return False, ""
    against = reason_against(device, head_dim, dtype)
    return against is None, fitting(device, head_dim, dtype).describe() if against is None else against
