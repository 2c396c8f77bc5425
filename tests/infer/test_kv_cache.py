"""The native cache: cached = uncached past the window and past the ring's wrap, rings = full, rows apart from each
other. In float64.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gemma_ft.families.records import PRESETS
from gemma_ft.model.config import GemmaNumerics
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.model.kv_cache import KVCache, Pass
from gemma_ft.model.static_pass import StaticPass
from tests.parity.amplified import FIRST, SECOND, SHAPES, WINDOW, ours, relative, token_rows

TOLERANCE = 1e-10
TOKENS = 4 * WINDOW + 3  # decoding wraps the ring more than once
CPU = torch.device("cpu")


def cache_for(model: GemmaForCausalLM, *, rows: int = 1, full: bool = False) -> KVCache:
    """A cache for a tiny model; `full`: local layers keep every key too."""
    windows = model.model.numerics.window_tokens
    return KVCache([None] * len(windows) if full else windows, slots=rows, max_seq_len=TOKENS + 1)


@torch.no_grad()
def fed(model: GemmaForCausalLM, cache: KVCache, first: int, pieces: list[Tensor]) -> list[Tensor]:
    """Logits of new tokens, one row of the cache each, padded on the right to the longest piece."""
    counts = [len(piece) for piece in pieces]
    ids = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=5)
    one = cache.open(first, counts, CPU)
    logits = model(ids, past_key_values=one, use_cache=True).logits
    one.finish()
    return [row[:count] for row, count in zip(logits, counts, strict=True)]


def in_pieces(model: GemmaForCausalLM, cache: KVCache, ids: Tensor, cut: list[int], row: int = 0) -> Tensor:
    """All logits of one sequence, piece by piece and then token by token."""
    cut = cut + [1] * (len(ids) - sum(cut))
    return torch.cat([fed(model, cache, row, [piece])[0] for piece in ids.split(cut)])


CUTS = ([1], [5], [WINDOW - 1], [WINDOW], [WINDOW + 1], [3, 4, 6], [WINDOW, WINDOW], [21], [5, 16, 1, 9], [TOKENS])


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("shape", [FIRST, SECOND])
def test_fault_14_cached_logits_equal_uncached_ones_past_the_wrap(shape: str, cut: list[int]) -> None:
    model, ids = ours(shape, dtype=torch.float64), token_rows(1, TOKENS)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits[0]
    assert relative(in_pieces(model, cache_for(model), ids[0], cut), whole) <= TOLERANCE


def test_the_ring_of_a_local_layer_holds_exactly_its_window() -> None:
    model = ours(SECOND, dtype=torch.float64)
    cache = cache_for(model)
    in_pieces(model, cache, token_rows(1, TOKENS)[0], [5])
    places = [cache.rings[layer].parts[0].shape[2] for layer in range(3)]
    assert places == [WINDOW, TOKENS + 1, WINDOW]
    assert cache.lengths == [TOKENS]
    heads, width = model.config.num_key_value_heads, model.config.head_dim
    assert cache.nbytes() == 2 * sum(places) * heads * width * 8


@pytest.mark.parametrize(
    "cut", [cut if i % 2 else pytest.param(cut, marks=pytest.mark.slow) for i, cut in enumerate(CUTS)], ids=str
)
def test_a_ring_equals_a_full_cache(cut: list[int]) -> None:
    model, ids = ours(SECOND, dtype=torch.float64), token_rows(1, TOKENS)[0]
    ring, full = (in_pieces(model, cache_for(model, full=full), ids, cut) for full in (False, True))
    assert relative(ring, full) <= TOLERANCE


@pytest.mark.parametrize("lengths", [(3, 8, 1), (9, 2, 20), (8, 16, 17)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_fault_25_ragged_rows_equal_each_row_alone(shape: str, lengths: tuple[int, ...]) -> None:
    """Prompts read together and padded on the right, then eleven tokens for each: past the wrap for some, not all."""
    model, ids = ours(shape, dtype=torch.float64), token_rows(3, max(lengths) + 11)
    together = cache_for(model, rows=3)
    found = [fed(model, together, 0, [row[:length] for row, length in zip(ids, lengths, strict=True)])]
    for step in range(11):
        found.append(
            fed(model, together, 0, [row[n + step : n + step + 1] for row, n in zip(ids, lengths, strict=True)])
        )
    for row, length in enumerate(lengths):
        alone = in_pieces(model, cache_for(model), ids[row, : length + 11], [length])
        assert relative(torch.cat([step[row] for step in found]), alone) <= TOLERANCE


@pytest.mark.parametrize("shape", [FIRST, SECOND])
def test_a_row_given_to_another_sequence_shows_no_trace_of_the_first(shape: str) -> None:
    model, ids = ours(shape, dtype=torch.float64), token_rows(2, TOKENS)
    cache = cache_for(model, rows=2)
    in_pieces(model, cache, ids[0], [TOKENS])
    for ring in cache.rings:  # what lies there could hardly be louder
        for part in ring.parts:
            part.fill_(1e30)
    cache.lengths[0] = 0
    again = in_pieces(model, cache, ids[1], [3, 9])
    assert torch.equal(again, in_pieces(model, cache_for(model, rows=2), ids[1], [3, 9]))


@pytest.mark.parametrize("shape", [FIRST, SECOND])
def test_a_moved_row_goes_on_as_if_it_had_stayed(shape: str) -> None:
    model, ids = ours(shape, dtype=torch.float64), token_rows(2, TOKENS)
    cache = cache_for(model, rows=3)
    fed(model, cache, 0, [ids[0, :13]])
    fed(model, cache, 2, [ids[1, :20]])
    cache.move(2, 1)
    assert cache.lengths == [13, 20, 0]
    found = [fed(model, cache, 0, [ids[0, 13 + i : 14 + i], ids[1, 20 + i : 21 + i]]) for i in range(9)]
    for row, length in enumerate((13, 20)):
        alone = in_pieces(model, cache_for(model), ids[row, : length + 9], [length])[length:]
        assert relative(torch.cat([step[row] for step in found]), alone) <= TOLERANCE


def test_memory_grows_with_the_longest_row_and_keeps_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma_ft.model.kv_cache.FIRST_PLACES", 4)
    model, ids = ours(SECOND, dtype=torch.float64), token_rows(1, TOKENS)
    cache = cache_for(model)
    assert cache.nbytes() == 0
    places = []
    pieces = []
    for token in ids[0].split(1):
        pieces.append(fed(model, cache, 0, [token])[0])
        places.append(cache.rings[1].parts[0].shape[2])
    assert sorted(set(places)) == [4, 8, 16, 32, TOKENS + 1]
    with torch.no_grad():
        assert relative(torch.cat(pieces), model(ids, use_cache=False).logits[0]) <= TOLERANCE


def test_misuse_of_a_pass_is_refused() -> None:
    cache = KVCache([None], slots=3, max_seq_len=8)
    cache.lengths = [2, 3, 8]
    for first, counts, message in [
        (0, [1, 0], "every row of a pass brings a token"),
        (0, [2, 2], "rows of different lengths take one token at a time"),
        (2, [1], "the sequence is longer than the cache"),
    ]:
        with pytest.raises(AssertionError, match=f"^{message}$"):
            cache.open(first, counts, CPU)


@torch.no_grad()
def test_sliding_layers_of_a_gemma_3_keep_their_window_and_full_ones_all() -> None:
    """Five to one, at the 270M's own numbers of heads and places; in a pass that is recorded too."""
    config = PRESETS["gemma-3-270m"].config()
    windows = GemmaNumerics.from_config(config).window_tokens
    full = [layer for layer, window in enumerate(windows) if window is None]
    assert full == [5, 11, 17]
    tokens, longest = 600, 800
    cache = KVCache(windows, slots=1, max_seq_len=longest)
    draw = torch.Generator().manual_seed(0)
    shape = (1, config.num_key_value_heads, tokens + 3, config.head_dim)
    keys, values = (torch.randn(shape, generator=draw) for _ in range(2))

    def fed(one: Pass, begin: int, end: int) -> None:
        for layer in range(len(windows)):
            cache_keys, _ = one.update(keys[:, :, begin:end], values[:, :, begin:end], layer)
            positions = one.key_positions(layer)[0]
            held = positions >= 0
            assert torch.equal(cache_keys[0, :, held], keys[0][:, positions[held]])

    begin = 0
    for count in (400, 200, 1):  # up to the window, past it, one token
        one = cache.open(0, [count], CPU)
        fed(one, begin, begin + count)
        one.finish()
        begin += count
    cache.places(tokens + 3)
    static = StaticPass(cache, 1, torch.tensor([begin]))
    fed(static, begin, begin + 1)
    for layer, ring in enumerate(cache.rings):
        place = begin if layer in full else begin % 512
        assert ring.limit == (longest if layer in full else 512)
        assert all(part.shape[2] == ring.limit or layer in full for part in ring.parts)
        assert torch.equal(ring.parts[1][0, :, place], values[0, :, begin])
        assert int(static.held(layer)) == (begin + 1 if layer in full else 512)
