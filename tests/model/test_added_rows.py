"""Rows behind a base's table against one table that holds them all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gemma_ft.model.added_rows import AddedRows
from tests.parity.amplified import SHAPES, VOCAB, masked_labels, ours, relative

ADDED = 3


def pair(shape: str, dtype: torch.dtype) -> tuple[Any, Any, Tensor]:
    """(a model whose table has all rows, one whose last rows were added, ids in which these occur)."""
    whole = ours(shape, dtype=dtype, vocab_size=VOCAB + ADDED)
    split = ours(shape, dtype=dtype)
    table = whole.model.embed_tokens.weight.detach()
    with torch.no_grad():
        for name, weight in split.named_parameters():
            weight.copy_(dict(whole.named_parameters())[name][: len(weight)])
    split.model.added_rows = AddedRows(VOCAB, torch.zeros(ADDED, table.shape[1]))
    with torch.no_grad():
        split.model.added_rows.weight = torch.nn.Parameter(table[VOCAB:].to(torch.promote_types(dtype, torch.float32)))
    ids = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    ids[:, ::5] = VOCAB + torch.arange(5) % ADDED
    return whole, split, ids


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_loss_are_those_of_one_table(shape: str, dtype: torch.dtype) -> None:
    whole, split, ids = pair(shape, dtype)
    labels = masked_labels(ids)
    labels[:, 5] = ids[:, 5]  # an added token is asked for
    one, other = whole.eval()(ids, labels=labels), split.eval()(ids, labels=labels)
    assert one.logits.shape[-1] == VOCAB + ADDED
    assert relative(other.logits, one.logits) <= (1e-12 if dtype == torch.float64 else 2e-2)
    torch.testing.assert_close(other.loss, one.loss, rtol=1e-12 if dtype == torch.float64 else 1e-2, atol=0)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_one_table(shape: str, frozen: bool) -> None:
    whole, split, ids = pair(shape, torch.float64)
    split.requires_grad_(not frozen)
    split.model.added_rows.requires_grad_(True)
    for model in (whole.train(), split.train()):
        model(ids, labels=ids).loss.backward()
    table = whole.model.embed_tokens.weight.grad
    rows = split.model.added_rows.weight.grad
    assert rows.abs().min(dim=1).values.max() > 0
    torch.testing.assert_close(rows, table[VOCAB:], rtol=1e-10, atol=1e-12)
    if frozen:
        assert all(one.grad is None for name, one in split.named_parameters() if "added_rows" not in name)
    else:
        torch.testing.assert_close(split.model.embed_tokens.weight.grad, table[:VOCAB], rtol=1e-10, atol=1e-12)


def test_rows_that_are_off_are_what_they_began_as() -> None:
    _, split, ids = pair(SHAPES[-1], torch.float64)
    rows = split.model.added_rows
    learned = split.eval()(ids).logits
    rows.enabled = False
    before = split(ids).logits
    assert relative(before, learned) > 1e-3
    with torch.no_grad():
        rows.weight.copy_(rows.initial)
    rows.enabled = True
    assert torch.equal(split(ids).logits, before)


def test_an_id_behind_the_last_row_is_refused_and_not_read_elsewhere() -> None:
    _, split, ids = pair(SHAPES[-1], torch.float64)
    ids[0, 3] = VOCAB + ADDED
    with pytest.raises(IndexError):
        split(ids)
