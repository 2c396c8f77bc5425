"""Attention of a single query is that of the reference, with and without cap and mask; a mask is left out only where
it would hide nothing.
"""

from __future__ import annotations

import pytest
import torch

from gemma_ft.kernels.attention import eager_attention
from gemma_ft.kernels.decode_attention import decode_attention_reference
from gemma_ft.model.attention import visible_keys
from gemma_ft.model.kv_cache import KVCache

ROWS, HEADS, KV_HEADS, KEYS, WIDTH = 3, 4, 2, 37, 16


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
def test_it_is_the_reference(softcap: float | None, masked: bool, dtype: torch.dtype, tolerance: float) -> None:
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(ROWS, HEADS, 1, WIDTH, generator=draw).to(dtype)
    key, value = torch.randn(2, ROWS, KV_HEADS, KEYS + 5, WIDTH, generator=draw).to(dtype)[:, :, :, :KEYS]
    visible = torch.rand(ROWS, 1, 1, KEYS, generator=draw) < 0.5 if masked else torch.ones(1, 1, 1, KEYS).bool()
    expected = eager_attention(query, key, value, visible, scale=0.25, softcap=softcap)
    found = decode_attention_reference(query, key, value, visible if masked else None, scale=0.25, softcap=softcap)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("limit", [None, 8])
def test_no_mask_is_needed_only_where_it_hides_nothing(limit: int | None) -> None:
    window, longest = 8, 24
    cache = KVCache([limit], slots=2, max_seq_len=longest)
    left_out = 0
    for lengths in ([0, 0], [3, 3], [3, 5], [7, 7], [7, 20], [20, 20], [12, 9]):
        cache.lengths[:] = lengths
        one = cache.open(0, [1, 1], torch.device("cpu"))
        visible = visible_keys(one.position_ids, one.key_positions(0), window_tokens=window)
        assert one.sees_all(0, window) == bool(visible.all()), lengths
        left_out += one.sees_all(0, window)
    assert left_out == (6 if limit else 3)
    cache.lengths[:] = 4, 4
    assert not cache.open(0, [2, 2], torch.device("cpu")).sees_all(0, window)
