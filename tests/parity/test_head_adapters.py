"""A head with something around it: the loss and every gradient are those of stock transformers with stock PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from gemma_ft.model.layered_head import layered_head_loss
from gemma_ft.model.lm_head import fused_head_loss, softcapped
from tests.parity.amplified import FIRST, SECOND, THIRD, gradients, masked_labels, ours, reference, relative, token_rows

TOLERANCE = 1e-5
KINDS: dict[str, dict[str, Any]] = {
    "rows of tokens, whose tied head is no target": {"trainable_token_indices": [10, 40, 12]},
    "rows of the head alone": {"trainable_token_indices": {"lm_head": [10, 11]}},
    "LoRA on the embedding": {"target_modules": ["embed_tokens"]},
    "LoRA on embedding and head, tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "LoRA on the head": {"target_modules": ["lm_head", "q_proj"]},
    "DoRA on the head": {"target_modules": ["lm_head"], "use_dora": True},
    "DoRA on the embedding": {"target_modules": ["embed_tokens"], "use_dora": True},
    "the head as a whole": {"modules_to_save": ["lm_head"]},
    "the embedding as a whole": {"modules_to_save": ["embed_tokens"]},
    "both as one": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


def tuned(model: Any, settings: dict[str, Any]) -> Any:
    """`model` with adapters that change it; equal seeds give equal adapters."""
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **settings}))
    with torch.no_grad():
        for name, weight in sorted(wrapped.named_parameters()):
            if weight.requires_grad:
                change = 0.1 * torch.randn(weight.shape)
                weight.mul_(1 + change) if "magnitude" in name else weight.add_(change)
    return wrapped


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", [FIRST, SECOND, THIRD])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_on_stock(kind: str, shape: str) -> None:
    """peft 0.21.2 around transformers 5.24's Gemma."""
    ids, results = token_rows(), []
    for build in (ours, reference):
        model = tuned(build(shape), KINDS[kind])
        loss = model.train()(input_ids=ids, labels=masked_labels(ids)).loss
        loss.backward()
        results.append((loss.detach(), gradients(model)))
    (loss, found), (wanted, expected) = results
    assert relative(loss, wanted) <= TOLERANCE
    assert found.keys() == expected.keys()
    off = {name: relative(found[name], expected[name]) for name in expected}
    assert max(off.values()) <= TOLERANCE, {name: value for name, value in off.items() if value > TOLERANCE}


def test_only_scoring_needs_no_training() -> None:
    ids = token_rows()
    model = tuned(ours(SECOND), {"modules_to_save": ["lm_head"]}).eval()
    with torch.no_grad():
        found = model(ids, labels=ids)
    wanted = torch.nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(found.loss, wanted)
    with torch.no_grad():
        assert int(model(ids, labels=ids, skip_logits=True).token_count) == ids[:, 1:].numel()


@pytest.mark.parametrize("chunk_rows", [1, 3, 1000, None])
def test_in_layers_it_is_the_fused_loss(chunk_rows: int | None) -> None:
    """For a head that is one weight, where both can be had: sums, counts, gradients, with weights on the losses."""
    draw = torch.Generator().manual_seed(0)
    hidden = (torch.randn(2, 9, 12, generator=draw, dtype=torch.float64) * 6).requires_grad_()
    weight = torch.randn(37, 12, generator=draw, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 37, (2, 9), generator=draw)
    labels[:, 2:5] = -100
    each = torch.rand(2, 9, generator=draw)

    def logits(rows: Tensor) -> Tensor:
        return softcapped(rows @ weight.T, 30.0)

    wanted = fused_head_loss(hidden, weight, labels, softcap=30.0, loss_weights=each)
    found = layered_head_loss(logits, hidden, labels, words=37, loss_weights=each, chunk_rows=chunk_rows)
    for one, two in zip(vars(found).values(), vars(wanted).values(), strict=True):
        torch.testing.assert_close(one, two)
    pairs = (torch.autograd.grad(one.loss_sum, (hidden, weight)) for one in (found, wanted))
    for one, two in zip(*pairs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_without_a_label_the_loss_is_nothing_and_has_a_gradient() -> None:
    ids = token_rows()
    model = tuned(ours(SECOND), {"target_modules": ["lm_head"]}).train()
    loss = model(ids, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(not weight.grad.any() for weight in model.parameters() if weight.grad is not None)
