"""LoRA from peft around our model: nothing changes at B = 0, gradients equal stock's, adapters open in stock peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from gemma_ft.model.gemma import GemmaForCausalLM
from tests.parity.amplified import (
    ONE_OF_EACH,
    SOME,
    gradients,
    masked_labels,
    ours,
    reference,
    relative,
    token_rows,
)

TOLERANCE = 1e-5
KINDS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
MODULES = 3 * 7  # three layers of q, k, v, o, gate, up, down


def wrapped(model: Any, **more: Any) -> PeftModel:
    """`model` with fresh adapters on all its linear layers but the head; equal seeds give equal adapters."""
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **more))


def stir(model: PeftModel) -> None:
    """Adapters as training would leave them: B no longer zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if "lora_B" in name:
                weight.normal_(0, 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SOME)
def test_fault_15_a_fresh_adapter_changes_no_logit(shape: str, dtype: torch.dtype) -> None:
    ids = token_rows()
    model = wrapped(ours(shape, dtype=dtype)).eval()
    assert sum("lora_B" in name for name, _ in model.named_parameters()) == MODULES
    assert torch.equal(model(ids).logits, ours(shape, dtype=dtype)(ids).logits)
    stir(model)
    assert relative(model(ids).logits, ours(shape, dtype=dtype)(ids).logits) > 1e-2, "the adapters are not in the path"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SOME)
def test_gradients_of_adapters_equal_those_on_stock(shape: str, kind: str) -> None:
    """In float64: in float32 the rounding of stock's own sums comes to 1e-5 on some processors."""
    ids = token_rows()
    grads = []
    for build in (ours, reference):
        model = wrapped(build(shape, dtype=torch.float64), **KINDS[kind])
        stir(model)
        model.train()(input_ids=ids, labels=masked_labels(ids)).loss.backward()
        grads.append(gradients(model))
    found, expected = grads
    assert found.keys() == expected.keys()
    assert len(found) >= 2 * MODULES
    assert all("embed_tokens" not in name and "lm_head" not in name for name in found)
    off = {name: relative(found[name], expected[name]) for name in expected}
    assert max(off.values()) <= TOLERANCE, {name: value for name, value in off.items() if value > TOLERANCE}


@pytest.mark.parametrize("shape", ONE_OF_EACH)
def test_an_adapter_of_ours_opens_on_stock_with_equal_logits(shape: str, tmp_path: Path) -> None:
    ids, model = token_rows(), wrapped(ours(shape)).eval()
    stir(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] in (None, "CAUSAL_LM")
    stock = PeftModel.from_pretrained(reference(shape), tmp_path).eval()
    assert relative(model(ids).logits, stock(ids).logits) <= TOLERANCE
    again = PeftModel.from_pretrained(ours(shape), tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("shape", SOME)
def test_merged_equals_adapted(shape: str) -> None:
    ids, model = token_rows(), wrapped(ours(shape, dtype=torch.float64)).double().eval()
    stir(model)
    adapted = model(ids).logits
    merged = model.merge_and_unload()
    assert isinstance(merged, GemmaForCausalLM)
    assert relative(merged(ids).logits, adapted) <= 1e-10


@pytest.mark.parametrize("shape", ONE_OF_EACH)
def test_checkpointing_changes_no_gradient_of_an_adapter(shape: str) -> None:
    ids, grads = token_rows(), []
    for checkpointing in (False, True):
        model = wrapped(ours(shape, dtype=torch.float64))
        stir(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()(input_ids=ids, labels=ids).loss.backward()
        grads.append(gradients(model))
    assert all(relative(grads[1][name], grads[0][name]) <= 1e-6 for name in grads[0])
