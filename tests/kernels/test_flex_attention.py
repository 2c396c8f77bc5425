"""Attention by torch's FlexAttention is the one that writes out every score: cap, window, documents, shared keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gemma_ft.kernels import flex_attention as module
from gemma_ft.kernels.flex_attention import block_mask, flex_attention
from gemma_ft.model import attention
from gemma_ft.model.attention import BACKENDS, Visible, eager_attention, first_visible, visible_keys

TOKENS, WIDTH = 150, 16  # more than one block of a mask, and no multiple of one
HEADS = 4
GPU = torch.cuda.is_available()  # elsewhere torch has no backward of it
DEVICE = "cuda" if GPU else "cpu"
NEAR = {"cpu": 1e-5, "cuda": 2e-3}[DEVICE]  # a GPU multiplies float32 in its tiles


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2


def documents(cuts: list[int]) -> Tensor:
    return torch.cat([torch.full((size,), number) for number, size in enumerate(cuts)])[None]


CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"window_tokens": 40},
    "documents": {"document": torch.cat((documents([70, 30, 50]), documents([1, 140, 9])))},
    "window in documents": {"window_tokens": 20, "document": torch.cat((documents([70, 80]), documents([140, 10])))},
}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_eager_attention(case: dict[str, Any], softcap: float | None, kv_heads: int) -> None:
    low = first_visible(TOKENS, **{"window_tokens": None, **case})
    assert low is not None
    document = case.get("document")
    places = torch.arange(TOKENS)
    mask = visible_keys(places, places, window_tokens=case.get("window_tokens"), query_document=document,
                        key_document=document)  # fmt: skip
    found = []
    for attend in ("flex", "eager"):
        query, key, value = (
            drawn(2, heads, TOKENS, WIDTH, seed=heads + seed).to(DEVICE).requires_grad_(GPU)
            for seed, heads in enumerate((HEADS, kv_heads, kv_heads))
        )
        options = {"scale": 0.3, "softcap": softcap}
        if attend == "flex":
            out = flex_attention(query, key, value, block_mask(low.expand(2, -1).to(DEVICE)), **options)
        else:
            out = eager_attention(query, key, value, mask.to(DEVICE), **options)
        gradients = torch.autograd.grad(out, (query, key, value), drawn(*out.shape, seed=3).to(DEVICE)) if GPU else ()
        found.append((out, *gradients))
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm() / other.norm()) < NEAR


def test_the_backend_takes_it_where_it_serves_and_runs_of_keys_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: what the device is, and whether it serves, is told here."""
    monkeypatch.setattr(attention, "_flexes", lambda query: query.shape[2] > 1)
    monkeypatch.setattr(attention, "_on_cpu", lambda _: False)
    calls: list[int] = []
    monkeypatch.setattr(attention, "flex_attention", lambda query, *_, **__: calls.append(query.shape[2]) or query)
    parts = [drawn(1, 2, 6, WIDTH, seed=seed) for seed in range(3)]
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    runs = Visible(lambda: mask, lambda: torch.zeros(1, 6, dtype=torch.int64))
    options = {"scale": 1.0, "softcap": 5.0}
    BACKENDS["blockwise"](*parts, runs, **options)
    assert calls == [6]
    expected = eager_attention(*parts, mask, **options)
    for visible, more in ((Visible(lambda: mask), {}), (runs, {"dropout_p": 1e-9})):
        torch.testing.assert_close(BACKENDS["blockwise"](*parts, visible, **options, **more), expected)
    one = [parts[0][:, :, -1:], *parts[1:]]
    BACKENDS["blockwise"](*one, Visible(lambda: mask[:, :, -1:]), **options)
    assert calls == [6]


def test_a_batch_has_a_row_of_the_mask_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel does not look whether there is one."""
    made: list[Tensor] = []
    monkeypatch.setattr(attention, "block_mask", lambda low: made.append(low))
    places = torch.zeros(1, 6, dtype=torch.int64)
    visible = Visible(lambda: places, lambda: places)
    visible.block_mask(3, torch.device("meta"))
    visible.block_mask(3, torch.device("meta"))
    assert [(one.shape, one.stride(), one.device.type) for one in made] == [((3, 6), (6, 1), "meta")]


def test_a_gpu_that_cannot_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    reason = module.reason_against.__wrapped__
    monkeypatch.setattr(module.gpu, "reason_against", lambda *_: "Triton is not installed")
    assert reason(device, 256, torch.bfloat16) == "Triton is not installed"
    monkeypatch.setattr(module.gpu, "reason_against", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert reason(device, 256, torch.bfloat16) == "this GPU is older than FlexAttention"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(module, "flex_attention", lambda query, *_, **__: query * 2)
    assert reason(device, 256, torch.float32) is None

    def fails(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("long story\nOutOfResources: shared memory, Required: 163840, Hardware limit: 101376")

    monkeypatch.setattr(module, "flex_attention", fails)
    assert reason(device, 256, torch.float32) == (
        "FlexAttention does not run here (OutOfResources: shared memory, Required: 163840, Hardware limit: 101376)"
    )
