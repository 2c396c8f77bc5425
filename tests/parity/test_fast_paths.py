"""The fast paths together against plain torch, eager attention and PEFT's own layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from gemma_ft.adapters.fused_layers import with_fused_layers
from gemma_ft.kernels import cpp_backend
from tests.parity.amplified import SOME, gradients, masked_labels, ours, relative, token_rows

DOCUMENTS = torch.tensor([0] * 8 + [1] * 13).expand(2, -1)


@pytest.fixture(params=[True, False], ids=["C++", "plain torch"], autouse=True)
def built(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the operations in C++, and without them: both are fast paths against the reference below."""
    if request.param and not cpp_backend.operations().functions:
        pytest.skip(cpp_backend.operations().reason)
    if not request.param:
        plain(monkeypatch)


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on without C++."""
    monkeypatch.setattr(cpp_backend, "operations", lambda: cpp_backend.Operations({}, "none"))


def adapted(shape: str, dtype: torch.dtype, *, fast: bool) -> PeftModel:
    """A tiny Gemma with stirred adapters: as it trains by default, or written out."""
    torch.manual_seed(0)
    base = ours(shape, dtype=dtype, attn_implementation="auto" if fast else "eager")
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    model = get_peft_model(base, with_fused_layers(config) if fast else config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    return model.train()


def step(model: Any, labels: Tensor | None = None, times: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one packed micro-batch, and the adapters' gradients."""
    ids = token_rows()
    labels = masked_labels(ids) if labels is None else labels
    model.zero_grad()
    loss = model(input_ids=ids, labels=labels, document_ids=DOCUMENTS, use_cache=False).loss
    (loss * times).backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("shape", SOME)
def test_in_float32_loss_and_gradients_are_the_references(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, grads = step(adapted(shape, torch.float32, fast=True))
    plain(monkeypatch)
    expected, truth = step(adapted(shape, torch.float32, fast=False))
    assert relative(loss, expected) < 1e-5
    assert all(relative(grads[name], one) < 1e-5 for name, one in truth.items())


@pytest.mark.parametrize("shape", SOME)
def test_in_bf16_gradients_point_where_the_references_do(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cosine with the truth (the same bf16 weights in float64): no worse than PEFT's own by more than its own error."""
    loss, grads = step(adapted(shape, torch.bfloat16, fast=True))
    plain(monkeypatch)
    expected, slow = step(adapted(shape, torch.bfloat16, fast=False))
    truth = step(adapted(shape, torch.bfloat16, fast=False).double())[1]

    def cosine(found: dict[str, Tensor]) -> float:
        one, two = (torch.cat([grads[name].double().flatten() for name in truth]) for grads in (found, truth))
        return float(one @ two / one.norm() / two.norm())

    assert 1 - cosine(grads) < max(2 * (1 - cosine(slow)), 1e-3)
    assert relative(loss, expected) < 2e-2


@pytest.mark.parametrize("times", [0.25, 0.0])
def test_the_loss_may_be_scaled(times: float) -> None:
    model = adapted("gemma-2-2b", torch.float32, fast=True)
    whole = {name: one.clone() for name, one in step(model)[1].items()}
    part = step(model, times=times)[1]
    assert all(relative(part[name] + 1, whole[name] * times + 1) < 1e-6 for name in whole)


def test_checkpointing_changes_no_bit() -> None:
    model = adapted("gemma-2-2b", torch.bfloat16, fast=True)
    loss, grads = step(model)
    grads = {name: one.clone() for name, one in grads.items()}
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again, same = step(model)
    assert torch.equal(loss, again)
    assert all(torch.equal(grads[name], one) for name, one in same.items())


def test_a_micro_batch_without_labels_gives_nothing() -> None:
    loss, grads = step(adapted("gemma-2-2b", torch.float32, fast=True), labels=torch.full((2, 21), -100))
    assert loss == 0
    assert all(bool((one == 0).all()) for one in grads.values())
