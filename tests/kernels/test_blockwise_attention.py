"""Attention in blocks against every score written out: values, gradients, rounding, and what it never builds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gemma_ft.kernels import blockwise_attention as module
from gemma_ft.kernels.attention import eager_attention
from gemma_ft.kernels.blockwise_attention import blockwise_attention

TOKENS, WIDTH = 37, 8
CAPS = [None, 50.0, 2.0]


def runs(kind: str, tokens: int = TOKENS) -> Tensor:
    """low [2, T]: a window, documents, both."""
    places = torch.arange(tokens)
    window = (places - 5).clamp(min=0)
    documents = torch.where(places < 9, 0, torch.where(places < 30, 9, 30))
    return {
        "causal": torch.zeros(1, tokens, dtype=torch.long),
        "window": window[None],
        "documents": torch.stack([documents, torch.zeros_like(places)]),
        "both": torch.stack([torch.maximum(window, documents), window]),
        "itself": places[None],
    }[kind]


def mask_of(low: Tensor) -> Tensor:
    places = torch.arange(low.shape[1])
    return ((places >= low[:, :, None]) & (places <= places[:, None]))[:, None]


def inputs(kv_heads: int, dtype: torch.dtype = torch.float64, tokens: int = TOKENS) -> list[Tensor]:
    """query, key, value with scores far into the cap, none contiguous, and an upstream gradient."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, tokens, heads, WIDTH) for heads in (4, kv_heads, kv_heads, 4)]
    return [
        (torch.randn(shape, generator=draw, dtype=torch.float64) * 3).to(dtype).transpose(1, 2).requires_grad_()
        for shape in shapes
    ]


@pytest.mark.parametrize("block", [1, 7, 256])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["causal", "window", "documents", "both", "itself"])
@pytest.mark.parametrize("softcap", CAPS)
def test_values_and_gradients_are_those_of_eager(
    softcap: float | None, kind: str, kv_heads: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_QUERIES", block)
    *qkv, upstream = inputs(kv_heads)
    low = runs(kind)
    expected = eager_attention(*qkv, mask_of(low), scale=0.3, softcap=softcap)
    found = blockwise_attention(*qkv, low, scale=0.3, softcap=softcap)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(expected, qkv, upstream)
    given = torch.autograd.grad(found, qkv, upstream)
    for one, two in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)
    assert kind == "itself" or all(grad.abs().max() > 0.1 for grad in given)


@pytest.mark.parametrize("upstream", [0.25, 0.0])
def test_the_upstream_scale_reaches_every_gradient(upstream: float) -> None:
    *qkv, _ = inputs(2)
    out = blockwise_attention(*qkv, runs("both"), scale=0.3, softcap=50.0)
    whole = torch.autograd.grad(out.sum(), qkv, retain_graph=True)
    for one, two in zip(torch.autograd.grad(out.sum() * upstream, qkv), whole, strict=True):
        torch.testing.assert_close(one, two * upstream, rtol=1e-12, atol=1e-14)


def test_an_input_used_twice_gets_both_gradients() -> None:
    """Keys that are values, and queries that are keys."""
    query = inputs(4)[0]
    low = runs("both")
    found = torch.autograd.grad(
        blockwise_attention(query, query, query, low, scale=0.1, softcap=5.0).square().sum(), query
    )
    expected = torch.autograd.grad(
        eager_attention(query, query, query, mask_of(low), scale=0.1, softcap=5.0).square().sum(), query
    )
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("softcap", CAPS)
def test_in_bf16_it_is_as_near_to_the_truth_as_eager(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_QUERIES", 16)
    low = runs("both")
    truth_in = inputs(2)
    narrow = [one.detach().bfloat16().requires_grad_() for one in truth_in]
    wide = [one.detach().double().requires_grad_() for one in narrow]

    def errors(attend: Any, visible: Tensor) -> list[float]:
        def run(qkvg: list[Tensor], how: Any, what: Tensor) -> list[Tensor]:
            *qkv, upstream = qkvg
            out = how(*qkv, what, scale=0.3, softcap=softcap)
            return [out, *torch.autograd.grad(out, qkv, upstream)]

        truth = run(wide, eager_attention, mask_of(low))
        found = run(narrow, attend, visible)
        return [float((one.double() - two).norm() / two.norm()) for one, two in zip(found, truth, strict=True)]

    # values' gradients are rounded once for each block of queries, here sixteen, and not once for all
    ours, eager = errors(blockwise_attention, low), errors(eager_attention, mask_of(low))
    assert all(one <= 1.25 * other for one, other in zip(ours, eager, strict=True)), (ours, eager)


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_of_tokens_by_tokens_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_QUERIES", 32)
    tokens = 512
    *qkv, _ = inputs(1, torch.float32, tokens)
    window = (torch.arange(tokens) - 31).clamp(min=0)[None]
    with Largest() as seen:
        blockwise_attention(*qkv, window, scale=0.3, softcap=50.0).sum().backward()
    assert seen.elements <= max(one.numel() for one in qkv)
    with Largest() as seen:
        blockwise_attention(*qkv, torch.zeros_like(window), scale=0.3).sum().backward()
    assert seen.elements <= 4 * 32 * tokens < tokens * tokens


@pytest.mark.parametrize("wide", [True, False])
def test_autocast_changes_nothing(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward is under it, and backward may be or not: what they multiply is the same."""
    monkeypatch.setattr(module, "product_dtype", lambda x: torch.float32 if wide else x.dtype)
    *qkv, upstream = (one.detach().bfloat16().requires_grad_() for one in inputs(2))
    found = []
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            out = blockwise_attention(*qkv, runs("both"), scale=0.3, softcap=5.0)
            found += [[out, *torch.autograd.grad(out, qkv, upstream)]]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
