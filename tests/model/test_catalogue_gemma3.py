"""Where implementations of Gemma 3 and VaultGemma disagree, or went wrong: each by its number in docs/numerics.md.

Each can go red: beside the right value stands the wrong one, and they differ on this very input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_ft.errors import UserError
from gemma_ft.families.records import GEMMA_3, PRESETS, VAULTGEMMA
from gemma_ft.kernels.attention import eager_attention
from gemma_ft.model.attention import AttentionMask
from gemma_ft.model.config import GemmaNumerics
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.model.layers import GemmaMLP, GemmaRMSNorm, layer_angles
from tests.model.test_faults_attention import influence, spied
from tests.parity.amplified import GEMMA_3 as SIZES
from tests.parity.amplified import SHRINK, THIRD, TOKENS, VAULT, WINDOW, ours, relative, tiny_config, token_rows

KINDS = {"sliding": "sliding_attention", "full": "full_attention"}


def rms(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def of_one_layer(kind: str, shape: str = THIRD, **overrides: Any) -> GemmaForCausalLM:
    return ours(shape, num_hidden_layers=1, layer_types=[KINDS[kind]], **overrides)


@pytest.mark.parametrize("shape", ["gemma-3-270m", THIRD, VAULT])
def test_d08_norms_are_computed_in_float32(shape: str) -> None:
    """Those of queries and keys as well: 1 + w in bf16 loses w's last bits."""
    model = ours(shape, dtype=torch.bfloat16)
    norms = {name: one for name, one in model.named_modules() if isinstance(one, GemmaRMSNorm)}
    assert sum("q_norm" in name or "k_norm" in name for name in norms) == (0 if shape == VAULT else 6)
    seen = 0
    for norm in norms.values():
        draw = torch.Generator().manual_seed(0)
        x = (torch.randn(9, norm.weight.numel(), generator=draw) * 3).bfloat16()
        wide = rms(x.float())
        torch.testing.assert_close(norm(x), (wide * (1 + norm.weight.float())).bfloat16(), rtol=2**-7, atol=0)
        assert ((norm(x).float() - wide * (1 + norm.weight.float())).abs() <= 2**-8 * norm(x).float().abs()).all()
        seen += int(not torch.equal(norm(x), wide.bfloat16() * (1 + norm.weight)))
    assert seen == len(norms), "in bf16 they would differ"


def test_d09_softmax_is_computed_in_float32() -> None:
    """Of the same scores in bf16: nearer to the truth than powers and their sum in bf16."""
    draw = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 64, 8, generator=draw).bfloat16()
    visible = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
    scores = (query @ key.mT * 0.5).masked_fill(~visible, -torch.inf)
    truth = torch.softmax(scores.double(), dim=-1) @ value.double()
    powers = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    narrow = (powers / powers.sum(dim=-1, keepdim=True)) @ value
    wide = eager_attention(query, key, value, visible, scale=0.5)
    assert (wide.double() - truth).norm() < 0.8 * (narrow.double() - truth).norm()


@pytest.mark.parametrize("layers", [4, 62])
def test_d14_the_query_scale_is_the_configs_at_any_number_of_layers(layers: int) -> None:
    """llama.cpp tells a 27B by its 62 layers, and takes D / N for it."""
    numbers = {"num_hidden_layers": layers, "layer_types": None}
    for scalar in (10, 7):
        config = tiny_config(THIRD, query_pre_attn_scalar=scalar, **numbers)
        assert GemmaNumerics.from_config(config).query_scale == scalar**-0.5


def test_d15_a_cap_on_attention_is_refused_and_one_on_logits_is_applied() -> None:
    """transformers keeps the first in the config of a Gemma 3, and does not apply it."""
    with pytest.raises(UserError) as raised:
        ours(THIRD, attn_logit_softcapping=50.0)
    assert str(raised.value) == (
        "config.json: attn_logit_softcapping 50.0 is set, which transformers ignores in a Gemma 3; set it to null, or "
        "fetch the file again"
    )
    free, capped = (ours(THIRD, dtype=torch.float64, final_logit_softcapping=one)(token_rows()).logits
                    for one in (None, 3.0))  # fmt: skip
    assert relative(capped, 3 * torch.tanh(free / 3)) < 1e-13
    assert free.abs().max() > 6, "the cap would be seen"


def test_d16_the_table_is_as_long_as_the_config_says() -> None:
    """262,208 rows where a folder holds a vision tower, 262,144 where not, whatever a tokenizer counts."""
    rows = {name: PRESETS[name].fields["vocab_size"] for name in SIZES}
    assert rows == dict.fromkeys(("gemma-3-270m", "gemma-3-1b"), 262_144) | dict.fromkeys(
        ("gemma-3-4b", "gemma-3-12b", "gemma-3-27b"), 262_208
    )
    model = ours(THIRD, vocab_size=107)
    assert model.get_input_embeddings().num_embeddings == 107
    assert model(token_rows()).logits.shape[-1] == 107


@pytest.mark.parametrize("window", [512, 9])
def test_d19_r16_a_bidirectional_model_is_refused_whatever_its_window(window: int) -> None:
    """transformers halves the window of such a config while it reads it, so that nothing of it may be used."""
    config = PRESETS["gemma-3-270m"].config(use_bidirectional_attention=True, sliding_window=window)
    assert config.sliding_window == window // 2 + 1
    for build in (GemmaNumerics.from_config, GemmaForCausalLM):
        with pytest.raises(UserError) as raised:
            build(config)
        assert str(raised.value) == (
            "config.json: use_bidirectional_attention is set; this is an encoder, not a causal Gemma"
        )
    assert PRESETS["gemma-3-270m"].config(use_bidirectional_attention=False).sliding_window == 512


@pytest.mark.parametrize("shape", [THIRD, VAULT])
def test_r08_no_layer_sees_another_document(shape: str) -> None:
    """A mask that reached sliding layers alone let full ones see all that is packed."""
    documents = torch.tensor([[0] * 8 + [1] * 13])
    for kind in KINDS:
        model, ids = of_one_layer(kind, shape), token_rows(1)
        before = model(ids, document_ids=documents).logits
        ids[0, 3] = 50
        after = model(ids, document_ids=documents).logits
        assert torch.equal(after[:, 8:], before[:, 8:]), kind
        assert not torch.equal(after[:, 4:8], before[:, 4:8]), kind


@pytest.mark.parametrize("cached", [False, True])
def test_r11_sliding_layers_keep_their_window_when_a_mask_is_given(cached: bool) -> None:
    mask = (torch.arange(TOKENS)[None] >= 2).long()
    moved = influence(of_one_layer("sliding"), mask, cached=cached)
    assert moved == [place > TOKENS - 1 - WINDOW for place in range(TOKENS)]


@pytest.mark.parametrize("preset", SIZES)
def test_r14_the_factor_of_8_is_of_full_layers_alone_and_of_long_sizes_alone(preset: str) -> None:
    """Angles of position 1000 against arithmetic on Python's own floats, in each layer."""
    layers = GemmaNumerics.from_config(PRESETS[preset].config()).layers
    head_dim, long = layers[0].head_dim, preset in ("gemma-3-4b", "gemma-3-12b", "gemma-3-27b")
    angles = layer_angles(torch.tensor([[1000]]), layers, torch.float64)
    for kind, (cos, sin) in zip(layers, angles, strict=True):
        theta, factor = (1e6, 8 if long else 1) if kind.sliding_window is None else (1e4, 1)
        turns = [1000 / theta ** (2 * pair / head_dim) / factor for pair in range(head_dim // 2)] * 2
        exact = torch.tensor(turns, dtype=torch.float64)
        assert (cos[0, 0, 0] - exact.cos()).abs().max() < 1e-9
        assert (sin[0, 0, 0] - exact.sin()).abs().max() < 1e-9
    full, sliding = (one for one in {kind.rope for kind in layers})
    assert full != sliding


def test_r15_27b_scales_queries_by_168_and_not_by_its_head_dim(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {name: GemmaNumerics.from_config(PRESETS[name].config()).query_scale ** -2 for name in SIZES}
    assert found == pytest.approx(dict.fromkeys(SIZES, 256) | {"gemma-3-27b": 168}, rel=1e-12)
    assert PRESETS["gemma-3-27b"].fields["head_dim"] == 128
    for shape, scalar in (("gemma-3-4b", 256 // SHRINK), (THIRD, 168 // SHRINK)):
        asked = spied(monkeypatch, ours(shape))
        assert [layer["scale"] for layer in asked] == [pytest.approx(scalar**-0.5, rel=1e-15)] * 3


@pytest.mark.parametrize("window", [WINDOW - 1, WINDOW, WINDOW + 1])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("shape", ["gemma-3-270m", VAULT])
def test_r17_a_window_of_w_is_w_keys_with_the_querys_own(shape: str, cached: bool, window: int) -> None:
    """One too wide or too narrow is invisible in the perplexity of the real 270M."""
    everyone = torch.ones(1, TOKENS, dtype=torch.long)
    moved = influence(of_one_layer("sliding", shape, sliding_window=window), everyone, cached=cached)
    assert moved == [place >= TOKENS - window for place in range(TOKENS)]
    full = influence(of_one_layer("full", shape, sliding_window=window), everyone, cached=cached)
    assert full == [True] * TOKENS


@pytest.mark.parametrize("name", ["gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("shape", [THIRD, VAULT])
def test_gelu_is_the_tanh_approximation(shape: str, name: str) -> None:
    """The exact one is invisible in the perplexity of the real 270M."""
    mlp = ours(shape, dtype=torch.float64, hidden_activation=name).model.layers[0].mlp
    assert isinstance(mlp, GemmaMLP)
    x = torch.randn(3, mlp.gate_proj.in_features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gate = mlp.gate_proj(x)
    tanh = 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    assert relative(mlp(x), mlp.down_proj(tanh * mlp.up_proj(x))) < 1e-13
    assert relative(mlp.down_proj(F.gelu(gate) * mlp.up_proj(x)), mlp(x)) > 1e-5


Change = Callable[[Tensor, Tensor], Tensor]


def attended(model: GemmaForCausalLM, x: Tensor, **wrong: Change) -> Tensor:
    """Layer 0's attention written out in float64, without a mask; `wrong`: another function of a projection [.., H]
    and its norm's weight, for what is named.
    """
    part, numerics, n = model.model.layers[0].self_attn, model.model.numerics, x.shape[1]
    cos, sin = layer_angles(torch.arange(n)[None], numerics.layers, torch.float64)[0]

    def turned(one: Tensor) -> Tensor:
        first, second = one.chunk(2, dim=-1)
        return one * cos + torch.cat((-second, first), dim=-1) * sin

    def normed_then_turned(one: Tensor, weight: Tensor) -> Tensor:
        return turned(rms(one) * (1 + weight))

    assert part.q_norm is not None
    assert part.k_norm is not None
    heads = [proj(x).view(1, n, -1, part.head_dim).transpose(1, 2) for proj in (part.q_proj, part.k_proj, part.v_proj)]
    query = wrong.get("q", normed_then_turned)(heads[0], part.q_norm.weight)
    key = wrong.get("k", normed_then_turned)(heads[1], part.k_norm.weight)
    value = wrong.get("v", lambda one, _: one)(heads[2], part.k_norm.weight)
    key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], dim=1) for one in (key, value))
    weights = torch.softmax(query @ key.mT * numerics.query_scale, dim=-1)
    return part.o_proj((weights @ value).transpose(1, 2).reshape(1, n, -1))


def test_queries_and_keys_are_normalized_head_by_head_and_then_turned() -> None:
    """Trap 2: the norm's weight does not commute with the rotation; values are neither normalized nor turned."""
    model = of_one_layer("full", dtype=torch.float64, attn_implementation="eager")
    part, draw = model.model.layers[0].self_attn, torch.Generator().manual_seed(0)
    x = torch.randn(1, 6, model.config.hidden_size, generator=draw, dtype=torch.float64)
    angles = layer_angles(torch.arange(6)[None], model.model.numerics.layers, torch.float64)[0]
    found = part(x, angles, AttentionMask(lambda: torch.ones(1, 1, 6, 6, dtype=torch.bool)))
    assert relative(found, attended(model, x)) < 1e-12

    def turned(one: Tensor) -> Tensor:
        first, second = one.chunk(2, dim=-1)
        return one * angles[0] + torch.cat((-second, first), dim=-1) * angles[1]

    def over_all_heads(one: Tensor, weight: Tensor) -> Tensor:
        flat = rms(one.transpose(1, 2).flatten(2)).view(1, 6, -1, part.head_dim).transpose(1, 2)
        return turned(flat * (1 + weight))

    wrong: dict[str, Change] = {
        "no norm": lambda one, _: turned(one),
        "w for 1 + w": lambda one, weight: turned(rms(one) * weight),
        "turned, then normalized": lambda one, weight: rms(turned(one)) * (1 + weight),
        "all heads at once": over_all_heads,
    }
    for name, change in wrong.items():
        for which in ("q", "k"):
            assert relative(attended(model, x, **{which: change}), found) > 1e-3, (name, which)
    assert relative(attended(model, x, v=lambda one, weight: rms(one) * (1 + weight)), found) > 1e-3


@pytest.mark.parametrize("preset", [*SIZES, VAULT])
def test_the_full_layers_of_each_size(preset: str) -> None:
    """Traps 3 and 4: every sixth, counted from 1; the last layer may have a window. VaultGemma has none at all."""
    layers, window = PRESETS[preset].fields["num_hidden_layers"], PRESETS[preset].fields.get("sliding_window")
    full = range(layers) if preset == VAULT else range(5, layers, 6)
    expected = tuple(None if index in full else window for index in range(layers))
    assert GemmaNumerics.from_config(PRESETS[preset].config()).window_tokens == expected
    assert tuple(one.sliding_window for one in family(preset).layers(PRESETS[preset].fields)) == expected
    assert (expected[-1] is None) == (preset in ("gemma-3-270m", "gemma-3-12b", VAULT))


def family(preset: str) -> Any:
    return VAULTGEMMA if preset == VAULT else GEMMA_3


def test_positions_never_pass_through_bf16() -> None:
    """Trap 9: a model cast to bf16 turns by the frequencies that it had; only distances matter."""
    model, ids = ours("gemma-3-4b", dtype=torch.bfloat16), token_rows()
    near, far = (model(ids, position_ids=torch.arange(TOKENS)[None] + start).logits for start in (0, 3000))
    assert (far - near).norm() < 0.05 * near.norm()
    model.to(torch.bfloat16).float()
    angles = layer_angles(torch.tensor([[3000]]), model.model.numerics.layers, torch.float32)
    exact = layer_angles(torch.tensor([[3000]]), model.model.numerics.layers, torch.float64)
    assert all((one[0] - two[0]).abs().max() < 1e-3 for one, two in zip(angles, exact, strict=True))


@pytest.mark.parametrize("shape", [THIRD, VAULT])
def test_a_layer_is_its_formula(shape: str) -> None:
    """Trap 1: Gemma 3 normalizes what comes out of attention and MLP as well, VaultGemma only what goes in."""
    model = of_one_layer("full", shape, dtype=torch.float64, attn_implementation="eager")
    layer, kept = model.model.layers[0], {}
    layer.self_attn.register_forward_hook(lambda _, __, out: kept.update(attended=out))
    layer.register_forward_hook(lambda _, given, out: kept.update(x=given[0], out=out))
    model(token_rows(1))
    x, out = kept["x"], kept["out"]

    def norm(name: str, one: Tensor) -> Tensor:
        return rms(one) * (1 + layer.get_submodule(name).weight)

    named = {name for name, _ in layer.named_children() if "norm" in name}
    if shape == VAULT:
        assert named == {"input_layernorm", "pre_feedforward_layernorm"}
        middle = x + kept["attended"]
        expected = middle + layer.mlp(norm("pre_feedforward_layernorm", middle))
    else:
        assert named == {
            "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
        }  # fmt: skip
        middle = x + norm("post_attention_layernorm", kept["attended"])
        expected = middle + norm("post_feedforward_layernorm", layer.mlp(norm("pre_feedforward_layernorm", middle)))
    assert relative(out, expected) < 1e-12
