"""Faults that other toolkits shipped, in attention: caps swapped, window and layer parity, query scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gemma_ft.kernels.attention import eager_attention
from gemma_ft.model.attention import BACKENDS, AttentionMask
from gemma_ft.model.gemma import GemmaForCausalLM
from tests.parity.amplified import SECOND, SHAPES, SHRINK, TOKENS, WINDOW, ours, relative, tiny_config, token_rows


def spied(monkeypatch: pytest.MonkeyPatch, model: GemmaForCausalLM) -> list[dict[str, Any]]:
    """What every layer asks of its attention backend in one forward pass."""
    asked: list[dict[str, Any]] = []
    name = model.config._attn_implementation
    backend = BACKENDS[name]

    def spy(query: Tensor, key: Tensor, value: Tensor, visible: AttentionMask, **options: Any) -> Tensor:
        asked.append({"visible": visible, **options})
        return backend(query, key, value, visible, **options)

    monkeypatch.setitem(BACKENDS, name, spy)
    model(token_rows())
    return asked


@pytest.mark.parametrize("shape", SHAPES)
def test_fault_06_attention_is_capped_at_50_and_logits_at_30(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours(shape)
    second = model.config.model_type == "gemma2"
    asked = spied(monkeypatch, model)
    assert [layer["softcap"] for layer in asked] == [50.0 if second else None] * 3
    assert model.model.numerics.final_softcap == (30.0 if second else None)


def test_fault_06_the_cap_comes_after_the_scale_and_before_the_mask() -> None:
    draw = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 1, 6, 4, generator=draw, dtype=torch.float64) * 9
    visible = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    found = eager_attention(query, key, value, visible, scale=0.5, softcap=50.0)
    scores = 50 * torch.tanh(query @ key.transpose(2, 3) * 0.5 / 50)
    hidden = torch.full((6, 6), -torch.inf, dtype=torch.float64).triu(1)
    assert relative(found, torch.softmax(scores + hidden, dim=-1) @ value) < 1e-13
    masked_first = 50 * torch.tanh((query @ key.transpose(2, 3) * 0.5 + hidden) / 50)
    assert relative(torch.softmax(masked_first, dim=-1) @ value, found) > 1e-6, "a capped mask lets the future through"


SCALES = {"gemma-2b": 256, "gemma-7b": 256, "gemma-2-2b": 256, "gemma-2-9b": 256, "gemma-2-27b": 144}


@pytest.mark.parametrize("shape", SHAPES)
def test_fault_10_the_query_scale_is_the_config_scalar(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """9B: 256, not 224 = D / N. 27B: 144 = D / N, not 128 = H."""
    model = ours(shape)
    shrunk = SCALES[shape] / SHRINK
    assert [layer["scale"] for layer in spied(monkeypatch, model)] == [pytest.approx(shrunk**-0.5, rel=1e-15)] * 3


def influence(model: GemmaForCausalLM, mask: Tensor, *, cached: bool) -> list[bool]:
    """Which tokens of the row move the last position's logits when they are exchanged."""
    ids = token_rows(1)

    def last(row: Tensor) -> Tensor:
        if not cached:
            return model(row, attention_mask=mask, use_cache=False).logits[:, -1]
        cache = model(row[:, :-1], attention_mask=mask[:, :-1], use_cache=True).past_key_values
        return model(row[:, -1:], attention_mask=mask, past_key_values=cache, use_cache=True).logits[:, -1]

    before = last(ids)
    moved = []
    for place in range(TOKENS):
        changed = ids.clone()
        changed[0, place] = (changed[0, place] - 4 + 31) % 97 + 4
        moved.append(not torch.equal(last(changed), before))
    return moved


@pytest.mark.parametrize("padding", [0, 3, 16])
@pytest.mark.parametrize("cached", [False, True])
def test_fault_09_a_local_layer_sees_exactly_the_window(cached: bool, padding: int) -> None:
    """One layer, which is layer 0 and local: the last query sees itself and the WINDOW - 1 keys before it."""
    mask = (torch.arange(TOKENS)[None] >= padding).long()
    moved = influence(ours(SECOND, num_hidden_layers=1), mask, cached=cached)
    expected = [place > TOKENS - 1 - WINDOW and place >= padding for place in range(TOKENS)]
    assert moved == expected
    assert sum(expected) == min(WINDOW, TOKENS - padding)


@pytest.mark.parametrize("cached", [False, True])
def test_fault_09_odd_layers_see_everything(cached: bool) -> None:
    moved = influence(ours(SECOND, num_hidden_layers=2), torch.ones(1, TOKENS, dtype=torch.long), cached=cached)
    assert all(moved)


def test_fault_09_even_layers_are_the_local_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = spied(monkeypatch, ours(SECOND, num_hidden_layers=5))
    widest = [int(layer["visible"].mask.sum(dim=-1).max()) for layer in asked]
    assert widest == [WINDOW, TOKENS, WINDOW, TOKENS, WINDOW]
    config = tiny_config(SECOND, num_hidden_layers=5)
    kinds = ["sliding_attention", "full_attention"]
    assert config.layer_types == [kinds[index % 2] for index in range(5)]
