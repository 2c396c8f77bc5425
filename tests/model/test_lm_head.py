"""The fused head against plain cross-entropy in float64: value, gradients, counts, and what it never builds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from gemma_ft.model.lm_head import HeadLoss, fused_head_loss, softcapped
from gemma_ft.system.limits import IGNORE
from tests.parity.amplified import FIRST, SECOND, masked_labels, ours, token_rows

TOLERANCE = 1e-12
WIDTH, WORDS = 12, 37


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden [2, 9, D], weight [V, D], labels [2, 9] with a third masked; logits far into the cap."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, 9, WIDTH, generator=draw, dtype=torch.float64) * 6
    weight = torch.randn(WORDS, WIDTH, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, WORDS, (2, 9), generator=draw)
    labels[torch.rand(2, 9, generator=draw) < 0.33] = IGNORE
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def plain_loss(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """The same loss, written as a textbook would."""
    logits = hidden[:, :-1] @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


class Recorder(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation gives, and counts matrix products."""

    elements = 0
    products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += func is torch.ops.aten.mm.default
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


class Alive(TorchDispatchMode):
    """Counts the tensors with a row of logits for each of a chunk that live at once, and the numbers of the largest
    narrow tensor that is added to a wide one.
    """

    most = 0
    narrow = 0

    def __init__(self, chunk_rows: int) -> None:
        super().__init__()
        self.shape, self.chunks = (chunk_rows, WORDS), list[StorageWeakRef]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and result.shape == self.shape:
            self.chunks = [one for one in self.chunks if not one.expired()] + [StorageWeakRef(result.untyped_storage())]
            self.most = max(self.most, len(self.chunks))
        added = args[1] if func is torch.ops.aten.add_.Tensor else None
        if isinstance(added, Tensor) and added.dtype != args[0].dtype:
            self.narrow = max(self.narrow, added.numel())
        return result


@pytest.mark.parametrize("upstream", [1.0, 0.25, 0.0])
@pytest.mark.parametrize("chunk_rows", [1, 3, 1000, None])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_value_and_gradients_equal_plain_cross_entropy(
    softcap: float | None, chunk_rows: int | None, upstream: float
) -> None:
    hidden, weight, labels = inputs()
    expected = plain_loss(hidden, weight, labels, softcap)
    wanted = torch.autograd.grad(expected * upstream, (hidden, weight))
    found = fused_head_loss(hidden, weight, labels, softcap=softcap, chunk_rows=chunk_rows)
    given = torch.autograd.grad(found.loss_sum * upstream, (hidden, weight))
    torch.testing.assert_close(found.loss_sum, expected, rtol=TOLERANCE, atol=0)
    for one, two in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=TOLERANCE, atol=TOLERANCE)
    assert upstream == 0 or all(grad.abs().max() > 0.1 for grad in given)


@pytest.mark.parametrize("chunk_rows", [1, 3, 1000])
def test_weights_multiply_each_tokens_loss(chunk_rows: int) -> None:
    hidden, weight, labels = inputs()
    weights = torch.rand(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3
    logits = softcapped(hidden[:, :-1] @ weight.T, 30.0)
    each = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="none")
    expected = (each * weights[:, 1:].flatten()).sum()
    wanted = torch.autograd.grad(expected, (hidden, weight))
    found = fused_head_loss(hidden, weight, labels, softcap=30.0, loss_weights=weights, chunk_rows=chunk_rows)
    given = torch.autograd.grad(found.loss_sum, (hidden, weight))
    torch.testing.assert_close(found.loss_sum, expected, rtol=TOLERANCE, atol=0)
    for one, two in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(found.weight_sum, weights[:, 1:][labels[:, 1:] != IGNORE].sum(), rtol=1e-14, atol=0)
    assert found.token_count == (labels[:, 1:] != IGNORE).sum()


def test_a_model_divides_by_the_weights_however_small() -> None:
    """A row of weight 3 counts as the row three times; the scale of all weights together is nothing."""
    model, ids = ours(SECOND).double().train(), token_rows()[:2]
    labels = masked_labels(ids)
    weights = torch.ones_like(ids, dtype=torch.float64)
    weights[1] = 3.0
    found = model(ids, labels=labels, loss_weights=weights * 1e-6).loss
    thrice = [0, 1, 1, 1]
    expected = model(ids[thrice], labels=labels[thrice]).loss
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=0)
    assert (found - model(ids, labels=labels).loss).abs() > 1e-3


def test_counts_are_of_labelled_tokens() -> None:
    hidden, weight, labels = inputs()
    labels[:, 1] = softcapped(hidden[:, 0] @ weight.T, 30.0).argmax(dim=-1)  # two right answers at least
    found = fused_head_loss(hidden, weight, labels, softcap=30.0, chunk_rows=4)
    guesses, labelled = (hidden[:, :-1] @ weight.T).argmax(dim=-1), labels[:, 1:] != IGNORE
    assert found.token_count == labelled.sum()
    assert found.correct_count == (guesses == labels[:, 1:]).sum() >= 2
    predicted = Categorical(logits=softcapped(hidden[:, :-1] @ weight.T, 30.0)[labelled])
    torch.testing.assert_close(found.entropy_sum, predicted.entropy().sum())
    assert not found.correct_count.requires_grad
    assert not found.entropy_sum.requires_grad


@pytest.mark.parametrize("trained_head", [True, False])
def test_no_labelled_row_is_a_finite_zero(trained_head: bool) -> None:
    hidden, weight, labels = inputs()
    weight.requires_grad_(trained_head)
    found = fused_head_loss(hidden, weight, torch.full_like(labels, IGNORE), softcap=30.0)
    found.loss_sum.backward()
    assert (found.loss_sum, found.token_count, found.correct_count) == (0, 0, 0)
    assert hidden.grad is not None
    assert not hidden.grad.any()
    assert weight.grad is None if not trained_head else not weight.grad.any()


def test_a_model_without_labelled_tokens_gives_a_finite_zero() -> None:
    model, ids = ours(SECOND).train(), token_rows()
    output = model(ids, labels=torch.full_like(ids, IGNORE))
    output.loss.backward()
    assert (output.loss, output.token_count) == (0, 0)
    assert all(not weight.grad.any() for weight in model.parameters())


def test_a_frozen_head_gets_no_gradient_and_keeps_nothing_of_its_size() -> None:
    hidden, weight, labels = inputs()
    frozen = weight.detach()
    wanted = torch.autograd.grad(plain_loss(hidden, frozen, labels, 30.0), hidden)[0]
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(tuple(x.shape)), x)[1], lambda x: x):
        found = fused_head_loss(hidden, frozen, labels, softcap=30.0)
    torch.testing.assert_close(torch.autograd.grad(found.loss_sum, hidden)[0], wanted, rtol=TOLERANCE, atol=TOLERANCE)
    assert kept
    assert all(WORDS not in shape for shape in kept), kept


def test_frozen_hidden_states_still_train_the_head() -> None:
    hidden, weight, labels = inputs()
    still = hidden.detach()
    found = torch.autograd.grad(fused_head_loss(still, weight, labels, softcap=None).loss_sum, weight)[0]
    wanted = torch.autograd.grad(plain_loss(still, weight, labels, None), weight)[0]
    torch.testing.assert_close(found, wanted, rtol=TOLERANCE, atol=TOLERANCE)


def test_no_grad_gives_the_same_value_and_no_graph() -> None:
    hidden, weight, labels = inputs()
    with torch.no_grad(), Recorder() as seen:
        found = fused_head_loss(hidden, weight, labels, softcap=30.0, chunk_rows=1000)
    assert seen.products == 1, "gradients were computed for nobody"
    assert not found.loss_sum.requires_grad
    torch.testing.assert_close(
        found.loss_sum, plain_loss(hidden, weight, labels, 30.0).detach(), rtol=TOLERANCE, atol=0
    )


def test_hidden_states_may_be_used_elsewhere_too() -> None:
    hidden, weight, labels = inputs()

    def both(loss: Tensor) -> Tensor:
        return torch.autograd.grad(2 * loss + hidden.pow(3).sum(), hidden)[0]

    found = both(fused_head_loss(hidden, weight, labels, softcap=30.0).loss_sum)
    torch.testing.assert_close(found, both(plain_loss(hidden, weight, labels, 30.0)), rtol=TOLERANCE, atol=TOLERANCE)


def test_two_losses_on_one_input_add_up() -> None:
    hidden, weight, labels = inputs()
    halves = [labels.clone(), labels.clone()]
    halves[0][:, 5:], halves[1][:, :5] = IGNORE, IGNORE
    losses: list[HeadLoss] = [fused_head_loss(hidden, weight, half, softcap=30.0) for half in halves]
    found = torch.autograd.grad(losses[0].loss_sum + losses[1].loss_sum, (hidden, weight))
    wanted = torch.autograd.grad(plain_loss(hidden, weight, labels, 30.0), (hidden, weight))
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=TOLERANCE, atol=TOLERANCE)


def test_bf16_gradients_are_accumulated_in_float32() -> None:
    """Many small chunks: a bf16 sum would stop growing after a few hundred."""
    hidden, weight, labels = inputs()
    labels = labels.repeat(1, 60)
    small_hidden = hidden.detach().bfloat16().repeat(1, 60, 1).requires_grad_()
    small_weight = weight.detach().bfloat16().requires_grad_()
    wanted = torch.autograd.grad(plain_loss(small_hidden.double(), small_weight.double(), labels, 30.0), small_weight)[
        0
    ]
    found = fused_head_loss(small_hidden, small_weight, labels, softcap=30.0, chunk_rows=1)
    assert found.loss_sum.dtype == torch.float32
    grads = torch.autograd.grad(found.loss_sum, (small_hidden, small_weight))
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.bfloat16]
    assert (grads[1] - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("trained_head", [True, False])
def test_logits_of_one_chunk_live_at_a_time(trained_head: bool, grad: bool) -> None:
    hidden, weight, labels = inputs()
    with torch.set_grad_enabled(grad), Alive(3) as seen:
        fused_head_loss(hidden, weight if trained_head else weight.detach(), labels, softcap=None, chunk_rows=3)
    assert seen.most == 1


def test_what_a_chunk_adds_to_the_heads_gradient_is_made_wide_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU makes a wide copy of all that it adds to a wide tensor: one of the whole head beside its gradient."""
    hidden, weight, labels = inputs()
    narrow = [hidden.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_()]
    whole = torch.autograd.grad(fused_head_loss(*narrow, labels, softcap=30.0, chunk_rows=3).loss_sum, narrow)
    monkeypatch.setattr("gemma_ft.model.lm_head.ROWS_NUMBERS", 5 * WIDTH)
    with Alive(3) as seen:
        found = fused_head_loss(*narrow, labels, softcap=30.0, chunk_rows=3)
    assert seen.narrow == 5 * WIDTH
    for one, two in zip(torch.autograd.grad(found.loss_sum, narrow), whole, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("shape", [FIRST, SECOND])
def test_training_never_builds_the_logits_of_a_sequence(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma_ft.model.lm_head.CHUNK_BYTES", 4 * 5003 * 16)
    model, ids = ours(shape, vocab_size=5003, num_hidden_layers=1).train(), token_rows(4, 80)
    model.requires_grad_(False).model.norm.requires_grad_(True)
    with Recorder() as seen:
        model(ids, labels=masked_labels(ids)).loss.backward()
    head = model.lm_head.weight.numel()
    assert seen.elements <= head < 4 * 80 * 5003, seen.elements
    with Recorder() as seen:
        model.eval()(ids)
    assert seen.elements == 4 * 80 * 5003, "the recorder sees logits where they are built"
