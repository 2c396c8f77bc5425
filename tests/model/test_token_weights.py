"""Weights of tokens that are an objective's derivative, of either sign and any sum, against autograd over full logits;
and the log-probabilities that they are made of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor

from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.model.layered_head import layered_head_loss, layered_token_logprobs
from gemma_ft.model.lm_head import (
    fused_head_loss,
    fused_token_logprobs,
    softcapped,
)
from gemma_ft.system.limits import IGNORE
from tests.parity.amplified import SECOND, masked_labels, ours, token_rows

WIDTH, WORDS, ADDED = 12, 37, 3
NEAR = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 6e-2}  # of the largest entry


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden [3, 9, D] whose logits are far into the cap (in bf16, where they are rounded, less far), weight [V, D],
    rows of added tokens, labels with a row that has none.
    """
    draw = torch.Generator().manual_seed(2)
    hidden = (torch.randn(3, 9, WIDTH, generator=draw) * (2 if dtype == torch.bfloat16 else 6)).to(dtype)
    weight, added = (torch.randn(size, WIDTH, generator=draw).to(dtype) for size in (WORDS, ADDED))
    labels = torch.randint(0, WORDS + ADDED, (3, 9), generator=draw)
    labels[torch.rand(3, 9, generator=draw) < 0.33] = IGNORE
    labels[2] = IGNORE  # a blank row
    return hidden.requires_grad_(), weight.requires_grad_(), added.requires_grad_(), labels


def token_weights(labels: Tensor, kind: str) -> Tensor:
    """As float32 [B, T]; what stands where nothing is labelled must not matter."""
    weights = torch.randn(labels.shape, generator=torch.Generator().manual_seed(3)) * 2
    labelled = labels[:, 1:] != IGNORE
    if kind == "zero sum":
        weights[:, 1:][labelled] -= weights[:, 1:][labelled].mean()
        assert abs(float(weights[:, 1:][labelled].sum())) < 1e-5
    if kind == "negative":
        weights = -weights.abs()
    weights[:, 1:][~labelled] = 1e6
    return weights


def full_logprobs(hidden: Tensor, weight: Tensor, added: Tensor, labels: Tensor, cap: float | None) -> Tensor:
    """[B, T], of whole logits in float64; 0 where there is no label."""
    logits = hidden.double()[:, :-1] @ torch.cat((weight, added)).double().T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    targets = labels[:, 1:]
    found = logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    return F.pad(torch.where(targets == IGNORE, 0.0, found), (1, 0))


def near(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    return bool((found.double() - wanted.double()).abs().max() <= NEAR[dtype] * wanted.abs().max())


def heads(weight: Tensor, added: Tensor, cap: float | None) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """(loss, log-probabilities) of each kind of head."""

    def logits(rows: Tensor) -> Tensor:
        return softcapped(rows @ torch.cat((weight, added)).T, cap)

    return {
        "fused": (
            lambda *given, **more: fused_head_loss(given[0], weight, given[1], softcap=cap, added=added, **more),
            lambda *given, **more: fused_token_logprobs(given[0], weight, given[1], softcap=cap, added=added, **more),
        ),
        "layered": (
            lambda *given, **more: layered_head_loss(logits, *given, words=WORDS + ADDED, **more),
            lambda *given, **more: layered_token_logprobs(logits, *given, words=WORDS + ADDED, **more),
        ),
    }


@pytest.mark.parametrize("kind", ["mixed", "negative", "zero sum"])
@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("dtype", list(NEAR))
@pytest.mark.parametrize("head", ["fused", "layered"])
def test_weights_of_either_sign_go_in_undivided(kind: str, cap: float | None, dtype: torch.dtype, head: str) -> None:
    hidden, weight, added, labels = inputs(dtype)
    weights = token_weights(labels, kind)
    wanted_sum = -(full_logprobs(hidden, weight, added, labels, cap) * weights.double()).sum()
    wanted = torch.autograd.grad(wanted_sum, (hidden, weight, added))
    loss, _ = heads(weight, added, cap)[head]
    found = loss(hidden, labels, loss_weights=weights, chunk_rows=5).loss_sum
    scale = (full_logprobs(hidden, weight, added, labels, cap) * weights).detach().abs().sum()
    assert (found - wanted_sum).detach().abs() <= NEAR[dtype] * scale
    for one, two in zip(torch.autograd.grad(found, (hidden, weight, added)), wanted, strict=True):
        assert two.abs().max() > 0.1
        assert near(one, two, dtype)


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("dtype", list(NEAR))
@pytest.mark.parametrize("head", ["fused", "layered"])
@pytest.mark.parametrize("chunk_rows", [2, None])
def test_log_probabilities_are_those_of_full_logits(
    cap: float | None, dtype: torch.dtype, head: str, chunk_rows: int | None
) -> None:
    hidden, weight, added, labels = inputs(dtype)
    _, logprobs = heads(weight, added, cap)[head]
    found = logprobs(hidden, labels, chunk_rows=chunk_rows)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert not found.requires_grad
    assert near(found, full_logprobs(hidden, weight, added, labels, cap), dtype)
    assert not found[:, 0].any()
    assert not found[:, 1:][labels[:, 1:] == IGNORE].any()
    nothing = logprobs(hidden, torch.full_like(labels, IGNORE), chunk_rows=chunk_rows)
    assert nothing.shape == labels.shape
    assert not nothing.any()


@pytest.mark.parametrize("head", ["fused", "layered"])
def test_a_function_is_given_the_losses_own_log_probabilities(head: str) -> None:
    """To the bit: what they weigh is what was scored."""
    hidden, weight, added, labels = inputs(torch.float32)
    loss, logprobs = heads(weight, added, 30.0)[head]
    asked: list[Tensor] = []
    plain = loss(hidden, labels, loss_weights=lambda given: asked.append(given) or -given, chunk_rows=2)
    assert torch.equal(asked[0], logprobs(hidden, labels, chunk_rows=2))
    assert torch.equal(plain.loss_sum, loss(hidden, labels, loss_weights=-asked[0], chunk_rows=2).loss_sum)


@pytest.mark.parametrize("around_the_head", [False, True])
def test_a_model_hands_them_to_its_head(around_the_head: bool) -> None:
    """Also where the head has an adapter with dropout: both passes draw the same."""
    model, ids = ours(SECOND).train(), token_rows()
    labels = masked_labels(ids)
    if around_the_head:
        config = LoraConfig(r=2, target_modules=["lm_head"], lora_dropout=0.5, init_lora_weights=False)
        model = get_peft_model(model, config).train()
    base: GemmaForCausalLM = model.get_base_model() if around_the_head else model
    asked: list[Tensor] = []
    torch.manual_seed(5)
    base.zero_grad()
    found = model(ids, labels=labels, loss_weights=lambda given: asked.append(given) or given, num_items_in_batch=1)
    torch.testing.assert_close(found.loss.detach(), -asked[0].square().sum(), rtol=1e-5, atol=0)
