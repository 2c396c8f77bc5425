"""The frozen product and the 4-bit layer that has it: bitsandbytes' values and gradients, for few rows and many."""

from __future__ import annotations

import copy

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

from gemma_ft.adapters.frozen_linear import frozen_product
from gemma_ft.adapters.nf4_linear import UnpackedLinear4bit, keep_unpacked
from gemma_ft.kernels import cpp_backend, gemv

built = pytest.mark.skipif(not cpp_backend.operations().functions, reason=cpp_backend.operations().reason)
IN, OUT = 192, 136


def quantized(dtype: torch.dtype, *, bias: bool = False, nested: bool = True) -> Linear4bit:
    torch.manual_seed(0)
    plain = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    layer = Linear4bit(IN, OUT, bias=bias, compute_dtype=dtype, compress_statistics=nested, quant_type="nf4")
    layer.weight = Params4bit(plain.weight.data, requires_grad=False, compress_statistics=nested, quant_type="nf4")
    layer.bias = None if plain.bias is None else nn.Parameter(plain.bias.data, requires_grad=False)
    layer = layer.to("cpu")
    layer.support_avx512bf16_for_cpu = False
    return layer


def rows(count: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@built
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 4, gemv.MOST_ROWS, gemv.MOST_ROWS + 1, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_the_product_with_bitsandbytes_weight(dtype: torch.dtype, count: int, nested: bool) -> None:
    layer = quantized(dtype, nested=nested)
    weight = dequantize_4bit(layer.weight, layer.weight.quant_state)
    x = rows(count, dtype)
    truth = x.double() @ weight.double().T
    tolerance = {torch.bfloat16: 4e-3, torch.float32: 1e-6}[dtype]
    for found in (frozen_product(x, layer.weight, layer.weight.quant_state), frozen_product(x, weight, None)):
        assert found.dtype == dtype
        assert float((found - truth).norm() / truth.norm()) < tolerance


@built
def test_a_row_is_the_same_among_few_and_among_fewer() -> None:
    layer = quantized(torch.bfloat16)
    x = rows(gemv.OWN_ROWS, torch.bfloat16)
    whole = frozen_product(x, layer.weight, layer.weight.quant_state)
    for row in range(len(x)):
        assert torch.equal(frozen_product(x[row : row + 1], layer.weight, layer.weight.quant_state)[0], whole[row])


@built
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_layer_has_bitsandbytes_values_and_gradients(dtype: torch.dtype) -> None:
    stock = nn.Sequential(quantized(dtype), quantized(dtype, bias=True))[:1]
    own = copy.deepcopy(stock)
    assert keep_unpacked(own) == 1
    assert type(own[0]) is UnpackedLinear4bit
    results = []
    for model in (own, stock):
        x = rows(20, dtype).view(4, 5, IN).requires_grad_()
        out = model(x)
        out.backward(torch.ones_like(out))
        assert x.grad is not None
        results.append((out.detach().double(), x.grad.double()))
    for one, other in zip(*results, strict=True):
        assert float((one - other).norm() / other.norm()) < {torch.bfloat16: 4e-3, torch.float32: 1e-6}[dtype]


@built
def test_asking_packs_nothing_and_training_goes_on() -> None:
    model = nn.Sequential(quantized(torch.bfloat16))
    keep_unpacked(model)
    before = model[0].weight.data.clone()
    with torch.no_grad():
        model.eval()(rows(1, torch.bfloat16))
    assert torch.equal(model[0].weight.data, before)
    x = rows(3, torch.bfloat16).requires_grad_()
    model.train()(x).sum().backward()
    assert x.grad is not None


@built
def test_a_bias_is_left_to_bitsandbytes() -> None:
    stock = nn.Sequential(quantized(torch.float32, bias=True))
    own = copy.deepcopy(stock)
    keep_unpacked(own)
    assert torch.equal(own(rows(3, torch.float32)), stock(rows(3, torch.float32)))


def test_without_the_operations_the_layers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_backend, "operations", lambda: cpp_backend.Operations({}, "none"))
    model = nn.Sequential(quantized(torch.bfloat16))
    assert keep_unpacked(model) == 0
    assert type(model[0]) is Linear4bit


@built
def test_layers_of_other_sizes_and_dtypes_share_the_memory() -> None:
    layers = [quantized(dtype, nested=nested) for dtype in (torch.bfloat16, torch.float32) for nested in (True, False)]
    x = rows(20, torch.float32)
    with torch.inference_mode():
        once = [frozen_product(x.to(one.compute_dtype), one.weight, one.weight.quant_state) for one in layers]
    for one, expected in zip(layers, once, strict=True):
        out = frozen_product(x.to(one.compute_dtype), one.weight, one.weight.quant_state)
        assert torch.equal(out, expected)
        assert out.requires_grad is False
