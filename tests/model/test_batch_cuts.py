"""Law: loss and gradient of a batch do not depend on how it is cut into micro-batches, to 1e-10 in float64."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemma_ft.model.gemma import GemmaForCausalLM
from tests.parity.amplified import SHAPES, gradients, ours, relative, token_rows

ROWS, TOKENS = 6, 11


@cache
def model_of(shape: str) -> GemmaForCausalLM:
    """One float64 model per shape, built when first asked for."""
    return ours(shape, dtype=torch.float64, num_hidden_layers=2).train()


def accumulated(
    model: GemmaForCausalLM, ids: Tensor, labels: Tensor, parts: list[list[int]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients summed over the micro-batches, each divided by the labelled tokens of the whole batch."""
    items = (labels[:, 1:] != -100).sum()
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for part in parts:
        loss = model(ids[part], labels=labels[part], num_items_in_batch=items).loss
        loss.backward()
        total += loss.detach()
    return total, {name: grad.clone() for name, grad in gradients(model).items()}


@st.composite
def cuts(draw: st.DrawFn) -> list[list[int]]:
    """The rows in any order, cut anywhere: micro-batches of unequal sizes, the last one short."""
    order = draw(st.permutations(range(ROWS)))
    ends = [*sorted(draw(st.sets(st.integers(1, ROWS - 1)))), ROWS]
    return [list(order[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(parts=cuts(), lengths=st.lists(st.integers(0, TOKENS), min_size=ROWS, max_size=ROWS), seed=st.integers(0, 99))
def test_fault_27_any_cut_gives_the_gradient_of_the_whole_batch(
    shape: str, parts: list[list[int]], lengths: list[int], seed: int
) -> None:
    model, ids = model_of(shape), token_rows(ROWS, TOKENS, seed)
    trained = torch.arange(TOKENS)[None] >= TOKENS - torch.tensor(lengths)[:, None]  # rows of 0 to all tokens
    trained[0, -2:] = True
    labels = ids.where(trained, torch.tensor(-100))
    whole, expected = accumulated(model, ids, labels, [list(range(ROWS))])
    loss, found = accumulated(model, ids, labels, parts)
    assert abs(float(loss - whole)) <= 1e-10 * float(whole)
    assert all(relative(found[name], expected[name]) <= 1e-10 for name in expected)


def test_fault_27_averaging_the_means_of_micro_batches_would_be_seen() -> None:
    """The fault this law guards against: the mean of the micro-batches' own means is another number."""
    model, ids = model_of("gemma-2-2b"), token_rows(ROWS, TOKENS)
    labels = ids.clone()
    labels[:3, :8] = -100
    whole, _ = accumulated(model, ids, labels, [list(range(ROWS))])
    means = [model(ids[part], labels=labels[part]).loss.item() for part in ([0, 1, 2], [3, 4, 5])]
    assert abs(sum(means) / 2 - float(whole)) > 1e-3 * float(whole)
