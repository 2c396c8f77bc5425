"""Weights made of log-probabilities: a frozen head multiplies its rows once for both; as two passes give it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gemma_ft.model.lm_head import HeadLoss, fused_head_loss, fused_token_logprobs
from gemma_ft.system.limits import IGNORE
from tests.kernels.forced import force
from tests.model.test_lm_head import Recorder

WIDTH, WORDS, ADDED = 24, 150, 3
CHUNK = 50
NEAR = {torch.float64: 1e-10, torch.float32: 1e-6}
UPSTREAM = 1 / 7  # a step divides by its pairs


def inputs(dtype: torch.dtype = torch.float64, *, blank: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden [4, 70, D] far into the cap, weight [V, D], rows of added tokens [A, D], labels with a row of none; only
    hidden asks for a gradient.
    """
    draw = torch.Generator().manual_seed(4)
    hidden = (torch.randn(4, 70, WIDTH, generator=draw) * 3).to(dtype)
    weight, added = (torch.randn(size, WIDTH, generator=draw).to(dtype) for size in (WORDS, ADDED))
    labels = torch.randint(0, WORDS + ADDED, (4, 70), generator=draw)
    labels[torch.rand(4, 70, generator=draw) < 0.3] = IGNORE
    labels[slice(None) if blank else 2] = IGNORE
    return hidden.requires_grad_(), weight, added, labels


def preferred(logprobs: Tensor) -> Tensor:
    """Of either sign, as a preference's; those of one row are 0."""
    sums = logprobs.sum(dim=1)
    slopes = torch.sigmoid(-0.01 * (sums - sums.roll(1))) * torch.tensor([1.0, -1.0, 1.0, 0.0]).to(sums)
    return slopes[:, None].expand_as(logprobs) * torch.linspace(0.5, 1.5, logprobs.shape[1]).to(sums)


def gradients(found: HeadLoss, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(found.loss_sum * UPSTREAM, of)


@pytest.mark.parametrize("kernels", ["cpp", "torch"])
@pytest.mark.parametrize("with_added", [True, False])
@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("dtype", list(NEAR))
def test_one_pass_gives_what_two_give(
    dtype: torch.dtype, cap: float | None, with_added: bool, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, kernels)
    hidden, weight, rows, labels = inputs(dtype)
    added = rows if with_added else None
    labels = labels.clamp(max=WORDS - 1)
    asked: list[Tensor] = []

    def weights(logprobs: Tensor) -> Tensor:
        asked.append(logprobs)
        return preferred(logprobs)

    options: dict[str, Any] = {"softcap": cap, "added": added, "chunk_rows": CHUNK}
    found = fused_head_loss(hidden, weight, labels, loss_weights=weights, **options)
    logprobs = fused_token_logprobs(hidden, weight, labels, **options)
    assert torch.equal(asked[0], logprobs), "what they weigh is what is scored, to the bit"
    wanted = fused_head_loss(hidden, weight, labels, loss_weights=preferred(logprobs), **options)
    assert torch.equal(found.loss_sum, wanted.loss_sum)
    assert torch.equal(found.weight_sum, wanted.weight_sum)
    assert (found.token_count, found.correct_count) == (wanted.token_count, wanted.correct_count)
    assert torch.equal(found.entropy_sum, wanted.entropy_sum)
    (one,), (other,) = gradients(found, hidden), gradients(wanted, hidden)
    assert (one - other).abs().max() <= NEAR[dtype] * other.abs().max()
    assert other[:2].any()
    assert not one[2:].any(), "a row without labels, and one whose weights are 0"


def test_a_blank_micro_batch_is_a_finite_zero() -> None:
    hidden, weight, added, labels = inputs(blank=True)
    found = fused_head_loss(hidden, weight, labels, softcap=30.0, added=added, loss_weights=preferred)
    assert (found.loss_sum, found.weight_sum, found.token_count, found.correct_count) == (0, 0, 0, 0)
    assert not gradients(found, hidden)[0].any()


def products(frozen: bool, call: Callable[..., Any]) -> int:
    """How many matrix products a loss and its gradient take."""
    hidden, weight, _, labels = inputs()
    weight.requires_grad_(not frozen)
    with Recorder() as seen:
        call(hidden, weight, labels, softcap=30.0, chunk_rows=CHUNK).loss_sum.backward()
    return seen.products


def test_the_head_multiplies_its_rows_once() -> None:
    """A product for logits and one for the rows' gradient, in each chunk; where the head is trained, logits again and
    its own gradient.
    """
    rows = int((inputs()[3][:, 1:] != IGNORE).sum())
    chunks = -(-rows // CHUNK)
    assert chunks == 3
    assert products(True, fused_head_loss) == 2 * chunks
    assert products(True, lambda *given, **more: fused_head_loss(*given, **more, loss_weights=preferred)) == 2 * chunks
    assert products(False, lambda *given, **more: fused_head_loss(*given, **more, loss_weights=preferred)) == 4 * chunks
    hidden, weight, _, labels = inputs()
    with torch.no_grad(), Recorder() as seen:
        fused_head_loss(hidden, weight, labels, softcap=30.0, chunk_rows=CHUNK, loss_weights=preferred)
    assert seen.products == chunks, "gradients were computed for nobody"


@pytest.mark.parametrize("which", ["weight", "added"])
def test_a_trained_head_gets_its_gradient(which: str) -> None:
    """Also where of a head only the rows of added tokens are trained."""
    hidden, weight, added, labels = inputs()
    trained = (weight if which == "weight" else added).requires_grad_()
    options: dict[str, Any] = {"softcap": 30.0, "added": added, "chunk_rows": CHUNK}
    weights = preferred(fused_token_logprobs(hidden, weight, labels, **options))
    found = fused_head_loss(hidden, weight, labels, loss_weights=preferred, **options)
    wanted = fused_head_loss(hidden, weight, labels, loss_weights=weights, **options)
    for one, other in zip(gradients(found, hidden, trained), gradients(wanted, hidden, trained), strict=True):
        assert other.any()
        assert torch.equal(one, other)


def test_frozen_hidden_states_need_no_gradient() -> None:
    hidden, weight, _, labels = inputs()
    found = fused_head_loss(hidden.detach(), weight, labels, softcap=30.0, loss_weights=preferred)
    assert not found.loss_sum.requires_grad


def test_nothing_of_the_size_of_the_vocabulary_is_kept() -> None:
    hidden, weight, _, labels = inputs()
    kept: list[tuple[int, ...]] = []
    with (
        Recorder() as seen,
        torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.shape), x)[1], lambda x: x),
    ):
        found = fused_head_loss(hidden, weight, labels, softcap=30.0, loss_weights=preferred, chunk_rows=16)
        gradients(found, hidden)
    assert (int(found.token_count), WIDTH) in kept
    assert all(WORDS not in shape for shape in kept), kept
    assert seen.elements == hidden.numel() > 16 * WORDS, "logits are of a chunk"


@pytest.mark.parametrize("kernels", ["cpp", "torch", "float32"])
@pytest.mark.parametrize("cap", [None, 30.0])
def test_in_bf16_a_gradient_is_as_near_the_truth_as_by_two_passes(
    cap: float | None, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, kernels)
    hidden, weight, _, labels = inputs(torch.bfloat16)
    hidden = (hidden.detach() * 0.3).requires_grad_()
    labels = labels.clamp(max=WORDS - 1)
    scored = fused_token_logprobs(hidden, weight, labels, softcap=cap)
    weights = preferred(scored)
    wide = hidden.detach().double().requires_grad_()
    truth = gradients(fused_head_loss(wide, weight.double(), labels, softcap=cap, loss_weights=weights), wide)[0]

    def error(given: Any) -> float:
        found = fused_head_loss(hidden, weight, labels, softcap=cap, loss_weights=given)
        return float((gradients(found, hidden)[0] - truth).norm() / truth.norm())

    asked: list[Tensor] = []
    fused_head_loss(hidden, weight, labels, softcap=cap, loss_weights=lambda given: asked.append(given) or given)
    assert torch.equal(asked[0], scored)
    assert 1e-4 < error(preferred) <= 1.05 * error(weights) < 1e-2
