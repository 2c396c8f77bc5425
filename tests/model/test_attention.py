"""Who sees whom: the masks key by key, the backends against each other, and the resolver's choices and refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_ft.errors import UserError
from gemma_ft.families.records import PRESETS
from gemma_ft.model.attention import (
    AttentionChoice,
    eager_attention,
    first_visible,
    resolve_attention,
    sdpa_attention,
    visible_keys,
)
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.model.masks import documents_of
from tests.parity.amplified import FIRST, SECOND, gradients, masked_labels, ours, relative, tiny_config, token_rows

NO_CAP = (
    "attention: sdpa cannot compute Gemma 2 and VaultGemma's soft-cap and would drop it; use auto, blockwise or eager"
)

UNKNOWN = "attention: unknown backend 'flash_attention_2'; use auto, blockwise, eager or sdpa"
TINY_3 = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64, "sliding_window": 8}  # fmt: skip
BLOCKS = "the soft-cap, in blocks: our own on a CPU, FlexAttention on a GPU"


def as_text(mask: torch.Tensor) -> list[str]:
    """A [T, S] mask as rows of x and dots."""
    return ["".join("x" if seen else "." for seen in row) for row in mask]


def test_the_causal_window_shows_exactly_its_width() -> None:
    index = torch.arange(5)
    assert as_text(visible_keys(index, index)[0, 0]) == ["x....", "xx...", "xxx..", "xxxx.", "xxxxx"]
    windowed = visible_keys(index, index, window_tokens=2)[0, 0]
    assert as_text(windowed) == ["x....", "xx...", ".xx..", "..xx.", "...xx"]


def test_cached_keys_are_counted_from_the_first_token() -> None:
    """Two new queries at places 6 and 7; the cache kept places 4 and 5 of a window of 3."""
    visible = visible_keys(torch.tensor([6, 7]), torch.arange(4, 8), window_tokens=3)
    assert as_text(visible[0, 0]) == ["xxx.", ".xxx"]


def test_padding_and_documents_hide_keys() -> None:
    index = torch.arange(4)
    real = torch.tensor([[False, True, True, True]])
    assert as_text(visible_keys(index, index, key_is_real=real)[0, 0]) == ["....", ".x..", ".xx.", ".xxx"]
    documents = torch.tensor([[0, 0, 1, 1]])
    visible = visible_keys(index, index, query_document=documents, key_document=documents)
    assert as_text(visible[0, 0]) == ["x...", "xx..", "..x.", "..xx"]


@st.composite
def sequences(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int | None]:
    """Documents of two rows, in one piece each; what is real of them; a window or none."""
    tokens = draw(st.integers(1, 12))
    rows = [sorted(draw(st.lists(st.integers(0, 3), min_size=tokens, max_size=tokens))) for _ in range(2)]
    ends = [sorted(draw(st.tuples(st.integers(0, tokens), st.integers(0, tokens)))) for _ in range(2)]
    real = torch.tensor([[first <= place < last for place in range(tokens)] for first, last in ends])
    return torch.tensor(rows), real, draw(st.sampled_from([None, 1, 3, 20]))


@settings(deadline=None, max_examples=200)
@given(sequences(), st.booleans(), st.booleans())
def test_runs_of_keys_are_those_of_the_mask(
    drawn: tuple[torch.Tensor, torch.Tensor, int | None], with_documents: bool, with_padding: bool
) -> None:
    documents, real, window = drawn
    index = torch.arange(documents.shape[1])
    mine, padded = documents if with_documents else None, real if with_padding else None
    mask = visible_keys(
        index, index, window_tokens=window, key_is_real=padded, query_document=mine, key_document=mine
    ).expand(2, 1, -1, -1)[:, 0]
    low = first_visible(len(index), window_tokens=window, key_is_real=padded, document=mine)
    assert low is not None
    low = low.expand(2, -1)
    assert bool((low <= index).all())
    assert bool((low >= 0).all())
    runs = (index[None, None] >= low[:, :, None]) & (index[None, None] <= index[None, :, None])
    asks = real if with_padding else torch.ones_like(real)
    assert torch.equal(runs[asks], mask[asks])


def test_what_is_in_pieces_is_no_run() -> None:
    assert first_visible(4, window_tokens=None, document=torch.tensor([[0, 1, 0, 0]])) is None
    assert first_visible(4, window_tokens=2, key_is_real=torch.tensor([[True, False, True, True]])) is None


def test_documents_begin_where_positions_do_not_go_on() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0], [5, 6, 7, 8, 9, 10, 11]])
    assert documents_of(positions).tolist() == [[0, 0, 0, 1, 1, 2, 3], [0] * 7]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_sdpa_equals_eager_and_both_equal_the_formula(kv_heads: int) -> None:
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 7, 6, generator=draw, dtype=torch.float64)
    key, value = torch.randn(2, 2, kv_heads, 7, 6, generator=draw, dtype=torch.float64)
    visible = visible_keys(torch.arange(7), torch.arange(7), window_tokens=3)
    eager = eager_attention(query, key, value, visible, scale=0.7)
    assert relative(sdpa_attention(query, key, value, visible, scale=0.7), eager) <= 1e-13
    head, row, low = 3, 5, 3  # one output written out: query 5 sees the keys 3, 4 and 5
    shared = head * kv_heads // 4
    weights = torch.softmax(0.7 * key[1, shared, low : row + 1] @ query[1, head, row], dim=0)
    assert relative(eager[1, head, row], weights @ value[1, shared, low : row + 1]) <= 1e-13


def test_fault_12_a_query_without_any_key_never_reaches_sdpa() -> None:
    """Such a row is NaN on some of SDPA's kernels and zero on others: it is opened to all keys before."""
    draw = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 4, 6, generator=draw)
    visible = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    visible[..., 1, :] = False
    found = sdpa_attention(query, key, value, visible, scale=0.7)
    open_row = torch.softmax(0.7 * query[:, :, 1:2] @ key.mT, dim=-1) @ value
    assert relative(found[:, :, 1:2], open_row) <= 1e-6
    assert eager_attention(query, key, value, visible, scale=0.7).isfinite().all()


@pytest.mark.parametrize("shape", ["gemma-2b", "gemma-7b"])
def test_gemma_1_is_the_same_on_all_backends(shape: str) -> None:
    ids = token_rows()
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    labels = masked_labels(ids).where(mask.bool(), torch.tensor(-100))
    labels[0, 6] = -100  # it would be predicted from padding, whose output means nothing
    logits, grads = {}, {}
    for name in ("sdpa", "eager", "blockwise"):
        model = ours(shape, dtype=torch.float64)
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        logits[name] = model(ids, attention_mask=mask).logits[mask.bool()]
        model.train()(ids, attention_mask=mask, labels=labels).loss.backward()
        grads[name] = gradients(model)
    for name in ("sdpa", "blockwise"):
        assert relative(logits[name], logits["eager"]) <= 1e-11
        assert all(relative(grads[name][one], grads["eager"][one]) <= 1e-10 for one in grads["eager"])


def test_dropout_of_attention_acts_in_training_only() -> None:
    ids = token_rows()
    for shape in (FIRST, SECOND):
        plain, model = ours(shape), ours(shape, attention_dropout=0.5)
        assert torch.equal(model(ids).logits, plain(ids).logits)
        torch.manual_seed(0)
        assert relative(model.train()(ids).logits, plain(ids).logits) > 1e-3


@pytest.mark.parametrize(
    ("requested", "softcap", "choice"),
    [
        (None, None, AttentionChoice("sdpa", "this Gemma has no soft-cap")),
        ("auto", None, AttentionChoice("sdpa", "this Gemma has no soft-cap")),
        (
            "auto",
            50.0,
            AttentionChoice("blockwise", BLOCKS),
        ),
        ("blockwise", None, AttentionChoice("blockwise", "asked for")),
        ("eager", 50.0, AttentionChoice("eager", "asked for")),
        ("sdpa", None, AttentionChoice("sdpa", "asked for")),
    ],
)
def test_the_resolver_chooses_and_says_why(
    requested: str | None, softcap: float | None, choice: AttentionChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_attention(requested, softcap) == choice
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if choice.reason == "this Gemma has no soft-cap":
        choice = AttentionChoice("blockwise", "FlexAttention, which takes documents and padding without a mask")
    assert resolve_attention(requested, softcap) == choice


@pytest.mark.parametrize(
    ("requested", "softcap", "message"),
    [
        ("sdpa", 50.0, NO_CAP),
        (
            "flash_attention_2",
            None,
            "attention: unknown backend 'flash_attention_2'; use auto, blockwise, eager or sdpa",
        ),
        (
            "flash_attention_2",
            50.0,
            "attention: unknown backend 'flash_attention_2'; use auto, blockwise, eager or sdpa",
        ),
    ],
)
def test_the_resolver_refuses_in_one_line(requested: str, softcap: float | None, message: str) -> None:
    with pytest.raises(UserError) as raised:
        resolve_attention(requested, softcap)
    assert str(raised.value) == message


def test_windows_without_a_cap_go_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Gemma 3: SDPA would be given a mask of T x T for each kind of layer."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen = AttentionChoice("blockwise", "windows, in blocks: what they hide is not computed, and no mask made")
    assert resolve_attention("auto", None, windows=True) == chosen
    assert resolve_attention("sdpa", None, windows=True) == AttentionChoice("sdpa", "asked for")
    windowed, whole = (
        GemmaForCausalLM(PRESETS["gemma-3-270m"].config(**TINY_3, layer_types=[kind] * 2))
        for kind in ("sliding_attention", "full_attention")
    )
    assert windowed.config._attn_implementation == "blockwise"
    assert whole.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("documents", [None, [9, 4, 11]])
@pytest.mark.parametrize("backend", ["blockwise", "sdpa"])
def test_a_gemma_3_is_the_same_in_blocks_and_by_masks(backend: str, documents: list[int] | None) -> None:
    """Loss and gradients past the window, of layers with and without one."""
    ids = torch.arange(24)[None] % 7 + 4
    row = None if documents is None else torch.arange(len(documents)).repeat_interleave(torch.tensor(documents))[None]

    def run(attention: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        config = PRESETS["gemma-3-270m"].config(
            **TINY_3, layer_types=["sliding_attention", "full_attention"], attn_implementation=attention
        )
        model = GemmaForCausalLM(config).double()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.normal_(0, 0.3 if "norm" in name else 2 / weight.shape[-1] ** 0.5)
        loss = model(ids, labels=ids, document_ids=row, use_cache=False).loss
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    for one, other in zip(run(backend), run("eager"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_fault_11_sdpa_that_drops_the_cap_is_refused_everywhere() -> None:
    draw = torch.zeros(1, 1, 1, 2)
    attempts = [
        lambda: resolve_attention("sdpa", 50.0),
        lambda: GemmaForCausalLM(tiny_config(SECOND, attn_implementation="sdpa")),
        lambda: ours(SECOND).set_attn_implementation("sdpa"),
        lambda: sdpa_attention(draw, draw, draw, torch.ones(1, 1, 1, 1, dtype=torch.bool), scale=1.0, softcap=50.0),
    ]
    for attempt in attempts:
        with pytest.raises(UserError) as raised:
            attempt()
        assert str(raised.value) == NO_CAP
    assert ours(SECOND).config._attn_implementation == "blockwise"
