"""Attention by torch's FlexAttention is the one that writes out every score: cap, window, documents, shared keys."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gemma_ft.kernels import flex_attention as module
from gemma_ft.kernels.attention import eager_attention
from gemma_ft.kernels.flex_attention import block_mask, flex_attention
from gemma_ft.model import attention
from gemma_ft.model.attention import BACKENDS, AttentionMask, first_visible, visible_keys
from tests.parity.amplified import SECOND, THIRD, ours, relative, token_rows

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
    """As on a GPU: whether it serves is told here."""
    monkeypatch.setattr(module, "serves", lambda query, *_: query.shape[2] > 1)
    calls: list[int] = []
    monkeypatch.setattr(module, "flex_attention", lambda query, *_, **__: calls.append(query.shape[2]) or query)
    parts = [drawn(1, 2, 6, WIDTH, seed=seed) for seed in range(3)]
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    runs = AttentionMask(lambda: mask, lambda: torch.zeros(1, 6, dtype=torch.int64))
    options = {"scale": 1.0, "softcap": 5.0}
    BACKENDS["blockwise"](*parts, runs, **options)
    assert calls == [6]
    expected = eager_attention(*parts, mask, **options)
    for visible, more in ((AttentionMask(lambda: mask), {}), (runs, {"dropout_p": 1e-9})):
        torch.testing.assert_close(BACKENDS["blockwise"](*parts, visible, **options, **more), expected)
    uncapped = {"scale": 1.0, "softcap": None}
    taken: list[int] = []
    monkeypatch.setattr(attention, "sdpa_attention", lambda query, *_, **__: taken.append(query.shape[2]) or query)
    BACKENDS["blockwise"](*(one.to("meta") for one in parts), AttentionMask(lambda: mask), **uncapped)
    assert taken == [6], "SDPA where there is no cap that it would drop"
    one = [parts[0][:, :, -1:], *parts[1:]]
    BACKENDS["blockwise"](*one, AttentionMask(lambda: mask[:, :, -1:]), **options)
    assert calls == [6]


PASSES: dict[str, dict[str, Tensor]] = {
    "alone": {},
    "padded": {"attention_mask": (torch.arange(TOKENS) >= torch.tensor([[0], [7]])).long()},
    "packed": {"document_ids": torch.cat((documents([70, 30, 50]), documents([1, 140, 9])))},
}


@pytest.mark.parametrize("given", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("shape", ["gemma-3-270m", "gemma-3-4b", THIRD, SECOND])
def test_a_model_with_two_kinds_of_layers_makes_two_masks(
    shape: str, given: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole models: norms of queries and keys, two RoPE bases, one mask of blocks for each kind of layer in a pass."""
    window, kinds = 40, ["sliding_attention", "full_attention"] * 2
    options = {"sliding_window": window, "num_hidden_layers": 4, "layer_types": kinds}
    flex, eager = (ours(shape, attn_implementation=name, **options) for name in ("blockwise", "eager"))
    ids, real = token_rows(2, TOKENS), given.get("attention_mask", torch.ones(2, TOKENS)).bool()
    masks: list[Any] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any, **how: Any) -> Tensor:
        masks.append(mask)
        return flex_attention(query, key, value, mask, **how)

    monkeypatch.setattr(module, "serves", lambda query, *_: query.shape[2] > 1)
    monkeypatch.setattr(module, "flex_attention", attend)
    with torch.no_grad():
        found, expected = (one(ids, **given, use_cache=False).logits[real] for one in (flex, eager))
    assert relative(found, expected) < 1e-4
    assert [one is masks[0] for one in masks] == [one is not masks[1] for one in masks] == [True, False] * 2
    batch, head = torch.tensor(0), torch.tensor(0)
    seen = [[bool(mask.mask_mod(batch, head, torch.tensor(60), torch.tensor(key))) for key in range(61)]
            for mask in masks[:2]]  # fmt: skip
    assert [row.count(True) for row in seen] == [window, 61]
    for wrong in ({"sliding_window": window + 1}, {"layer_types": kinds[::-1]}):
        with torch.no_grad():
            other = ours(shape, attn_implementation="eager", **{**options, **wrong})(ids, **given).logits[real]
        assert relative(other, expected) > 1e-3, wrong


def test_it_serves_what_is_trained_and_what_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "reason_against", lambda *_: None)

    def query(tokens: int, dtype: torch.dtype = torch.bfloat16) -> Any:
        return SimpleNamespace(is_cuda=True, shape=(1, 8, tokens, 256), dtype=dtype, device=torch.device("cuda"))

    assert module.serves(query(64))
    assert not module.serves(query(1))
    assert not module.serves(query(64, torch.float64))
    assert not module.is_short(query(64)), "a gradient is asked for"
    with torch.no_grad():
        assert module.is_short(query(512)), "a prompt would wait for what is compiled for its length"
        assert not module.is_short(query(4096))


def test_a_batch_has_a_row_of_the_mask_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel does not look whether there is one."""
    made: list[Tensor] = []
    monkeypatch.setattr(attention, "block_mask", lambda low: made.append(low))
    places = torch.zeros(1, 6, dtype=torch.int64)
    visible = AttentionMask(lambda: places, lambda: places)
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
    fit = module.Fit(None, "OutOfResources: shared memory, Required: 163840, Hardware limit: 101376", 1.0)
    monkeypatch.setattr(module, "fitting", lambda *_: fit)
    assert reason(device, 256, torch.float32) == (
        "FlexAttention does not run here (OutOfResources: shared memory, Required: 163840, Hardware limit: 101376)"
    )
    monkeypatch.setattr(module, "fitting", lambda *_: module.Fit({}, "", 1.0))
    assert reason(device, 256, torch.float32) is None


@pytest.mark.parametrize("fits", [0, 1, 2, 3], ids=["torch's own", "smaller", "smallest", "none"])
def test_the_first_tiles_that_run_are_taken(fits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[dict[str, int]] = []

    def attend(query: Tensor, *_: Any, tiles: dict[str, int], **__: Any) -> Tensor:
        tried.append(tiles)
        if len(tried) <= fits:
            raise RuntimeError("long story\nOutOfResources: shared memory")
        return query * 2

    monkeypatch.setattr(module, "flex_attention", attend)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    found = module.fitting.__wrapped__(torch.device("cpu"), 256, torch.float32)
    assert tried == list(module.TILES[: fits + 1])
    assert found.tiles == (module.TILES[fits] if fits < 3 else None)
    assert found.failed == ("OutOfResources: shared memory" if fits else "")
    assert ("smaller tiles" in found.describe()) == (fits > 0)


@pytest.mark.parametrize("tokens", [100, 128, 256, 300, 700])
@pytest.mark.parametrize("window", [None, 50, 128, 300])
def test_the_blocks_are_those_that_torch_finds_in_every_pair(tokens: int, window: int | None) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    draw = torch.Generator().manual_seed(tokens)
    document = (torch.rand(2, tokens, generator=draw) < 0.02).cumsum(dim=1)
    real = torch.ones(2, tokens, dtype=torch.bool)
    real[0, -5:], real[1, :37] = False, False
    low = first_visible(tokens, window_tokens=window, document=document, key_is_real=real)
    assert low is not None

    def seen(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (low[b, query] <= key) & (key <= query)

    found, expected = block_mask(low), create_block_mask(seen, 2, None, tokens, tokens, device="cpu")
    assert (found.shape, found.seq_lengths) == (expected.shape, expected.seq_lengths)
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, others = (getattr(one, f"{kind}_num_blocks") for one in (found, expected))
        assert torch.equal(counts, others)
        ours, theirs = (getattr(one, f"{kind}_indices") for one in (found, expected))
        for place in counts.nonzero().tolist():
            count = int(counts[tuple(place)])
            assert torch.equal(ours[tuple(place)][:count], theirs[tuple(place)][:count])


def test_a_run_compiles_few_forms_and_no_cap_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other lengths, batches and caps; torch would write out every score at its own limit, or fail at a second
    cap.
    """
    import torch._dynamo
    from torch._dynamo import config

    forms: list[Any] = []

    def keep(graph: Any, _: Any) -> Any:
        forms.append(graph)
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: real(function, backend=keep, **how))
    monkeypatch.setattr(module.environment, "keep_compiled", lambda: None)
    monkeypatch.setattr(module, "_on_gpu", lambda _: True)
    monkeypatch.setattr(module, "fitting", lambda *_: module.Fit({}, "", 0.0))
    for name in ("recompile_limit", "specialize_float"):
        monkeypatch.setattr(config, name, getattr(config, name))
    torch._dynamo.reset()
    module._compiled.cache_clear()

    def attended(batch: int, tokens: int, cap: float) -> None:
        query, key = (drawn(batch, heads, tokens, WIDTH, seed=heads) for heads in (2, 1))
        mask = block_mask(torch.zeros(batch, tokens, dtype=torch.int64))
        assert flex_attention(query, key, key, mask, scale=0.3, softcap=cap).shape == query.shape

    assert module.gpu.tried(lambda: attended(1, 256, 30.0)) is None  # in a thread of its own, as before a run
    for cap in (30.0, 50.0):
        for batch in (1, 2, 3):
            for tokens in (100, 130, 200, 300):
                attended(batch, tokens, cap)
    module._compiled.cache_clear()
    torch._dynamo.reset()
    assert 2 < len(forms) <= 12
    assert config.recompile_limit == module.RECOMPILES
