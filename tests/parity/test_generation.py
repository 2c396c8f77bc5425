"""Generation through transformers' `generate` and its caches: cached = uncached past the window, and greedy tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.generation.configuration_utils import (
    DEPRECATED_STATIC_CACHE_IMPLEMENTATIONS,
    STATIC_CACHE_IMPLEMENTATIONS,
)

from gemma_ft.model.gemma import GemmaForCausalLM
from tests.parity.amplified import ONE_OF_EACH, SECOND, SOME, TOKENS, ours, reference, relative, token_rows

TOLERANCE = 1e-10
CUTS = ([1] * TOKENS, [5, 1, 1, 14], [13, 1, 1, 6], [7, 1, 13], [8, 8, 5], [20, 1])  # around the window of 8


def ragged_prompts() -> tuple[Tensor, Tensor]:
    """Three prompts of 13, 8 and 2 tokens, padded on the left; ids and mask."""
    ids = token_rows(3, 13)
    mask = (torch.arange(13)[None] >= torch.tensor([0, 5, 11])[:, None]).long()
    return ids * mask, mask


def in_pieces(model: GemmaForCausalLM, ids: Tensor, mask: Tensor, cut: list[int], cache: Any) -> Tensor:
    """All logits, computed piece by piece with a cache."""
    pieces, start = [], 0
    for length in cut:
        end = start + length
        output = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        pieces.append(output.logits)
        start = end
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("padded", [0, 10])
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("shape", SOME)
def test_fault_14_cached_logits_equal_uncached_ones_past_the_window(shape: str, cut: list[int], padded: int) -> None:
    model, ids = ours(shape, dtype=torch.float64), token_rows()
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=False).logits
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=TOKENS + 3)):
            found = in_pieces(model, ids, mask, cut, cache)
            assert relative(found[mask.bool()], whole[mask.bool()]) <= TOLERANCE, type(cache)


@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 2}], ids=str
)
@pytest.mark.parametrize("shape", SOME)
def test_greedy_tokens_of_a_ragged_batch_equal_transformers(shape: str, options: dict[str, Any]) -> None:
    ids, mask = ragged_prompts()
    wanted = {"attention_mask": mask, "max_new_tokens": 14, "do_sample": False, "eos_token_id": None, **options}
    assert torch.equal(ours(shape).generate(ids, **wanted), reference(shape).generate(ids, **wanted))


STATIC = [  # the offloaded ones are a GPU's
    name
    for name in (*STATIC_CACHE_IMPLEMENTATIONS, *DEPRECATED_STATIC_CACHE_IMPLEMENTATIONS)
    if "offloaded" not in name
]


@pytest.mark.parametrize(
    ("tokens", "masked", "names"), [(5, False, ["static"]), (8, True, ["static"]), (13, False, STATIC)]
)  # shorter than the window, as long, longer
@pytest.mark.parametrize("shape", ONE_OF_EACH)
def test_greedy_tokens_are_the_same_with_every_cache(shape: str, tokens: int, masked: bool, names: list[str]) -> None:
    """transformers 5.24's names of caches; prompts without padding, for which its `generate` passes positions and no
    mask.
    """
    model, ids = ours(shape), token_rows(2, tokens)
    wanted = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    if masked:
        wanted["attention_mask"] = torch.ones_like(ids)
    expected = reference(shape).generate(ids, **wanted)
    assert torch.equal(model.generate(ids, **wanted), expected)
    for name in names:
        assert torch.equal(model.generate(ids, **wanted, cache_implementation=name), expected), name


@pytest.mark.parametrize("kind", ["alone", "packed", "packed, longer first", "late"])
@pytest.mark.parametrize("shape", ONE_OF_EACH)
def test_positions_mean_the_same_with_a_static_cache_as_without_one(shape: str, kind: str) -> None:
    model, ids = ours(shape, dtype=torch.float64), token_rows()
    lengths = {"packed": (6, 4, TOKENS - 10), "packed, longer first": (13, TOKENS - 13)}.get(kind, (TOKENS,))
    positions = torch.cat([torch.arange(length) for length in lengths])[None] + (3 if kind == "late" else 0)
    with torch.no_grad():
        whole = model(ids, position_ids=positions, use_cache=False).logits
        for length in (TOKENS, TOKENS + 9):
            cache = StaticCache(config=model.config, max_cache_len=length)
            found = model(ids, position_ids=positions, past_key_values=cache).logits
            assert relative(found, whole) <= TOLERANCE, length


@pytest.mark.parametrize("shape", SOME)
def test_fault_25_batched_generation_equals_single_generation(shape: str) -> None:
    model = ours(shape, dtype=torch.float64)
    ids, mask = ragged_prompts()
    wanted = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None}
    batched = model.generate(ids, attention_mask=mask, **wanted)
    for row in range(3):
        alone = model.generate(ids[row : row + 1, mask[row].bool()], **wanted)
        assert torch.equal(batched[row, 13:], alone[0, int(mask[row].sum()) :])


@pytest.mark.parametrize("shape", ONE_OF_EACH)
def test_generation_stops_at_every_stop_token(shape: str) -> None:
    model = ours(shape)
    ids, mask = ragged_prompts()
    free = model.generate(ids, attention_mask=mask, max_new_tokens=14, do_sample=False, eos_token_id=None)[0, 13:]
    stops = [int(free[9]), 1]
    stopped = model.generate(ids[:1], attention_mask=mask[:1], max_new_tokens=14, do_sample=False, eos_token_id=stops)
    first_stop = next(index for index, token in enumerate(free.tolist()) if token in stops)
    assert stopped[0, 13:].tolist() == free[: first_stop + 1].tolist()


@pytest.mark.parametrize("shape", ONE_OF_EACH)
def test_fault_08_generation_scores_carry_the_same_cap_as_the_forward_pass(shape: str) -> None:
    """Greedy tokens would hide a cap lost on one of the two ways: their logits are compared."""
    model = ours(shape, dtype=torch.float64)
    ids, mask = ragged_prompts()
    made = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    longer = torch.cat([mask, torch.ones(3, 12, dtype=torch.long)], dim=1)
    scored = model(made.sequences, attention_mask=longer).logits[:, 12:-1]
    assert relative(torch.stack(made.logits, dim=1), scored) <= 1e-6  # generate keeps its logits in float32


def test_training_mode_keeps_no_cache() -> None:
    """A checkpointed layer runs twice and would write its keys twice."""
    model, ids = ours(SECOND), token_rows()
    assert model(ids).past_key_values.get_seq_length() == TOKENS
    assert model.train()(ids).past_key_values is None
