"""PEFT's LoRA layers with the fused forward against PEFT's own: values, gradients, files, and when it steps aside."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from gemma_ft.adapters import fused_lora as module
from gemma_ft.adapters.fused_layers import FusedLinear, with_fused_layers

IN, OUT, RANK = 64, 128, 4


class Two(nn.Module):
    """Two linear layers that share their input, as gate and up do."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(IN, OUT, bias=bias), nn.Linear(IN, OUT, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x).tanh() * self.two(x)


def wrapped(model: nn.Module, fused: bool, **more: Any) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=10, target_modules=["one", "two"], **more)
    found = get_peft_model(model, with_fused_layers(config) if fused else config)
    with torch.no_grad():
        for name, weight in found.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return found


def pair(dtype: torch.dtype, quantized: bool = False, bias: bool = False, **more: Any) -> tuple[PeftModel, PeftModel]:
    """The same adapters on the same base: fused, and PEFT's own."""
    torch.manual_seed(3)
    base = Two(bias).to(dtype)
    if quantized:
        for name in ("one", "two"):
            layer = Linear4bit(IN, OUT, bias=False, compute_dtype=dtype, quant_type="nf4", quant_storage=dtype)
            layer.load_state_dict({"weight": getattr(base, name).weight.detach()})
            layer.support_avx512bf16_for_cpu = False
            setattr(base, name, layer.to("cpu"))
        base.is_loaded_in_4bit = True  # type: ignore[assignment]
    fused, stock = wrapped(copy.deepcopy(base), True, **more), wrapped(base, False, **more)
    for model in (fused, stock):
        for name, weight in model.named_parameters():
            if "lora" in name:
                weight.data = weight.data.to(torch.promote_types(dtype, torch.float32))
    return fused, stock


def result(model: PeftModel, dtype: torch.dtype, scale: float = 1.0) -> dict[str, Tensor]:
    x = (
        torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
    )
    out = model(x)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64).to(out.dtype)
    out.backward(upstream * scale)
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    return {"out": out.detach(), "x": x.grad, **grads}  # type: ignore[dict-item]


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    assert len(found) == 2 + 4
    for name, one in found.items():
        assert one.dtype == expected[name].dtype, name
        assert float((one - expected[name]).norm() / expected[name].norm()) < tolerance, name


def spied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Calls of the fused function are counted."""
    seen: list[int] = []
    real = module.fused_lora
    monkeypatch.setattr(module, "fused_lora", lambda *given, **more: (seen.append(1), real(*given, **more))[1])
    return seen


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_values_and_gradients_are_pefts(dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, stock = pair(dtype)
    seen = spied(monkeypatch)
    close(result(fused, dtype), result(stock, dtype), tolerance)
    assert len(seen) == 2
    assert isinstance(fused.base_model.model.one, FusedLinear)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_over_4_bits_too(dtype: torch.dtype, tolerance: float) -> None:
    fused, stock = pair(dtype, quantized=True)
    assert type(fused.base_model.model.one).__name__ == "FusedLinear4bit"
    close(result(fused, dtype), result(stock, dtype), tolerance)


@pytest.mark.parametrize("scale", [0.25, 0.0])
def test_the_upstream_gradient_counts(scale: float) -> None:
    whole, part = result(pair(torch.float64)[0], torch.float64), result(pair(torch.float64)[0], torch.float64, scale)
    for name in whole.keys() - {"out"}:
        assert torch.equal(whole[name] * scale, part[name])


def test_a_frozen_input_costs_no_gradient() -> None:
    fused, _ = pair(torch.float32)
    x = torch.randn(3, IN)
    fused(x).sum().backward()
    assert x.grad is None
    assert all(weight.grad is not None for weight in fused.parameters() if weight.requires_grad)
    with torch.no_grad():
        assert not fused(x).requires_grad


@pytest.mark.parametrize("case", ["dropout", "dora", "bias", "two adapters", "disabled", "merged", "autocast"])
def test_what_is_not_plain_lora_is_left_to_peft(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    more: dict[str, Any] = {"dropout": {"lora_dropout": 0.5}, "dora": {"use_dora": True}}.get(case, {})
    fused, stock = pair(torch.float32, bias=case == "bias", **more)
    seen = spied(monkeypatch)
    found = []
    for model in (fused, stock):
        if case == "two adapters":
            model.add_adapter("other", LoraConfig(r=2, target_modules=["one", "two"]))
            model.base_model.set_adapter(["default", "other"])
        if case == "merged":
            model.merge_adapter()
        x = torch.randn(2, IN, generator=torch.Generator().manual_seed(5))
        torch.manual_seed(9)
        with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
            if case == "disabled":
                with model.disable_adapter():
                    found.append(model(x))
            else:
                found.append(model(x))
    assert torch.equal(*found)
    assert not seen


def test_dropout_rests_in_eval_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, stock = pair(torch.float64, lora_dropout=0.5)
    seen = spied(monkeypatch)
    x = torch.randn(2, IN, dtype=torch.float64)
    assert torch.allclose(fused.eval()(x), stock.eval()(x), rtol=1e-12, atol=1e-12)
    assert len(seen) == 2


def test_files_and_merging_are_pefts(tmp_path: Path) -> None:
    fused, stock = pair(torch.float64)
    fused.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(copy.deepcopy(stock.unload()), str(tmp_path))
    x = torch.randn(2, IN, dtype=torch.float64)
    expected = fused(x)
    assert torch.allclose(again.double()(x), expected, rtol=1e-6)
    assert torch.allclose(fused.merge_and_unload()(x), expected, rtol=1e-10)


def test_what_is_hooked_is_left_to_peft() -> None:
    """accelerate's hooks replace a module's forward; torch's stand beside it."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Twice(ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return output * 2

    results = []
    for model in pair(torch.float32):
        add_hook_to_module(model.base_model.model.one.base_layer, Twice())
        model.base_model.model.two.lora_A["default"].register_forward_pre_hook(lambda _, given: (given[0] * 3,))
        results.append(model(torch.ones(2, IN)))
    assert torch.equal(*results)


@pytest.mark.parametrize("quantized", [False, True])
def test_an_output_may_be_written_to(quantized: bool) -> None:
    model = pair(torch.float32, quantized=quantized)[0]
    layer = model.base_model.model.one
    out = layer(torch.ones(2, 3, IN).requires_grad_())
    out += 1
    out.sum().backward()
    assert layer.lora_B["default"].weight.grad is not None


@pytest.mark.parametrize("rows", [1, 2, 3, 16])
def test_so_may_one_of_few_rows(rows: int) -> None:
    layer = pair(torch.bfloat16)[0].base_model.model.one
    out = layer(torch.ones(rows, IN).bfloat16().requires_grad_())
    out += 1
    out.sum().backward()
    assert layer.lora_B["default"].weight.grad is not None
