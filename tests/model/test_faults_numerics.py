"""Faults that other toolkits shipped, in the numbers: embedding, norms, activation, caps, pad row.

Each can go red here: beside the right value stands the wrong one, and they differ on this very input.
"""

from __future__ import annotations

import cmath
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_ft.families.family import Rope
from gemma_ft.families.records import PRESETS
from gemma_ft.kernels.rotary import rotate
from gemma_ft.model.attention import AttentionMask
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.model.layers import GemmaMLP, GemmaRMSNorm, GemmaScaledEmbedding, rotary_angles
from gemma_ft.model.lm_head import softcapped
from tests.parity.amplified import FIRST, SECOND, masked_labels, ours, relative, tiny_config, token_rows

ROUNDED = {"gemma-2b": 45.25, "gemma-7b": 55.5, "gemma-2-2b": 48.0, "gemma-2-9b": 59.75, "gemma-2-27b": 68.0,
           "gemma-3-270m": 25.25, "gemma-3-1b": 34.0, "gemma-3-4b": 50.5, "gemma-3-12b": 62.0,
           "gemma-3-27b": 73.5}  # fmt: skip


@pytest.mark.parametrize("preset", ROUNDED)
def test_fault_04_d17_the_embedding_scale_is_rounded_to_the_activation_dtype(preset: str) -> None:
    width = PRESETS[preset].fields["hidden_size"]
    embedding, ids = GemmaScaledEmbedding(1, width), torch.zeros(1, 1, dtype=torch.long)
    weight = torch.randn(width, generator=torch.Generator().manual_seed(0)).bfloat16()
    embedding.weight.data[0] = weight
    expected = (weight.float() * ROUNDED[preset]).bfloat16()
    unrounded = weight.float() * width**0.5
    assert torch.equal(embedding(ids)[0, 0], unrounded)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embedding(ids)[0, 0], expected)
    assert torch.equal(embedding.bfloat16()(ids)[0, 0], expected)
    assert torch.equal(unrounded.bfloat16(), expected) == (width == 2304), "48 is exact, the others would be seen"
    assert torch.equal(embedding.float()(ids)[0, 0], unrounded), "not what it was rounded to before"


@pytest.mark.parametrize("shape", [FIRST, SECOND])
def test_fault_04_positions_never_pass_through_bf16(shape: str) -> None:
    """Only distances matter: a bf16 model that starts at position 3000 gives nearly the logits that it gives at 0."""
    model, ids = ours(shape, dtype=torch.bfloat16), token_rows()
    near, far = (model(ids, position_ids=torch.arange(21)[None] + start).logits for start in (0, 3000))
    assert (far - near).norm() < 0.05 * near.norm()
    positions = torch.arange(3000, 3021)
    exact = rotary_angles(positions[None], 16, Rope(10000.0), torch.float64)[0]
    in_float32 = rotary_angles(positions[None], 16, Rope(10000.0), torch.float32)[0]
    in_bf16 = rotary_angles(positions.bfloat16().long()[None], 16, Rope(10000.0), torch.float32)[0]
    assert (in_float32 - exact).abs().max() < 1e-3
    assert (in_bf16 - exact).abs().max() > 1


def test_fault_04_rotation_is_half_split_and_turns_by_its_position() -> None:
    x = torch.randn(1, 1, 1, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = rotate(x, *rotary_angles(torch.tensor([[7]]), 6, Rope(10000.0), torch.float64))[0, 0, 0]
    for pair in range(3):  # dimension i turns with i + H/2, by position * theta^(-2i/H)
        angle = 7 * 10000.0 ** (-2 * pair / 6)
        plane = torch.complex(x[0, 0, 0, pair], x[0, 0, 0, pair + 3])
        expected = complex(plane) * cmath.exp(1j * angle)
        assert abs(turned[pair] - expected.real) < 1e-14
        assert abs(turned[pair + 3] - expected.imag) < 1e-14


@pytest.mark.parametrize("name", ["gelu", "gelu_pytorch_tanh"])
def test_fault_04_gelu_is_the_tanh_approximation_whatever_the_file_calls_it(name: str) -> None:
    for config in (tiny_config(FIRST, hidden_act=name), tiny_config(SECOND, hidden_activation=name)):
        mlp = GemmaForCausalLM(config).double().model.layers[0].mlp
        assert isinstance(mlp, GemmaMLP)
        x = torch.randn(3, config.hidden_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
        gate = mlp.gate_proj(x)
        tanh_gelu = 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
        assert relative(mlp(x), mlp.down_proj(tanh_gelu * mlp.up_proj(x))) < 1e-13
        assert relative(mlp.down_proj(F.gelu(gate) * mlp.up_proj(x)), mlp(x)) > 1e-5, "the exact GELU is another one"


def test_fault_05_the_norm_multiplies_in_float32_and_casts_last() -> None:
    draw = torch.Generator().manual_seed(0)
    norm = GemmaRMSNorm(64, 1e-6).bfloat16()
    x = (torch.randn(50, 64, generator=draw) * 3).bfloat16()
    weight = (torch.randn(64, generator=draw) * 0.3).bfloat16()
    norm.weight.data = weight
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(norm(x), (normed * (1 + weight.float())).bfloat16())
    assert norm(x).dtype == torch.bfloat16
    cast_first = normed.bfloat16() * (1 + weight.float()).bfloat16()
    narrow_sum = (normed * (1 + weight).float()).bfloat16()
    assert not torch.equal(norm(x), cast_first)
    assert not torch.equal(norm(x), narrow_sum)


def test_fault_05_the_norm_is_not_narrowed_in_float64() -> None:
    norm = GemmaRMSNorm(64, 1e-6).double()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert relative(norm(x), x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()) < 1e-14


def test_fault_06_the_final_cap_bounds_logits_not_hidden_states() -> None:
    model, ids = ours(SECOND, dtype=torch.float64), token_rows()
    model.model.norm.weight.data.mul_(10).add_(20)
    hidden = model.model(ids).last_hidden_state
    assert hidden.abs().max() > 30
    raw = hidden @ model.model.embed_tokens.weight.T
    assert raw.abs().max() > 60
    assert relative(model(ids).logits, 30 * torch.tanh(raw / 30)) < 1e-13
    assert 29 < model(ids).logits.abs().max() <= 30


def test_fault_08_the_cap_is_c_times_tanh_of_x_over_c() -> None:
    z = torch.tensor([-90.0, -30.0, 0.0, 15.0, 30.0, 1e4], dtype=torch.float64)
    expected = torch.tensor([-29.85164261, -22.84782467, 0.0, 13.86351472, 22.84782467, 30.0], dtype=torch.float64)
    assert (softcapped(z, 30.0) - expected).abs().max() < 1e-8
    assert torch.equal(softcapped(z, None), z)
    assert softcapped(z.bfloat16(), 30.0).dtype == torch.float32, "computed wide, or bf16 makes steps of 0.125"


def test_fault_08_the_training_loss_carries_the_cap() -> None:
    model, ids = ours(SECOND, dtype=torch.float64), token_rows()
    labels = masked_labels(ids)
    logits = model(ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert relative(model.train()(ids, labels=labels).loss, expected) < 1e-12
    uncapped = ours(SECOND, dtype=torch.float64, final_logit_softcapping=None).train()(ids, labels=labels).loss
    assert relative(uncapped, expected) > 1e-3


def test_fault_07_the_feed_forward_norms_load_each_into_its_place(tmp_path: Path) -> None:
    ids, model = token_rows(), ours(SECOND)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    loaded = GemmaForCausalLM.from_pretrained(tmp_path).eval()
    assert all(torch.equal(loaded.state_dict()[name], weights[name]) for name in weights)
    layer = loaded.model.layers[0]
    x = torch.randn(2, 5, 288, generator=torch.Generator().manual_seed(0))
    angles = rotary_angles(torch.arange(5)[None], 8, Rope(10000.0), torch.float32)
    visible = AttentionMask(lambda: torch.ones(1, 1, 5, 5, dtype=torch.bool).tril())
    middle = x + layer.post_attention_layernorm(layer.self_attn(layer.input_layernorm(x), angles, visible))
    expected = middle + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(middle)))
    assert torch.equal(layer(x, angles, visible), expected)
    swap = {"pre_feedforward": "post_feedforward", "post_feedforward": "pre_feedforward"}
    swapped = {
        next((name.replace(old, new) for old, new in swap.items() if old in name), name): value
        for name, value in weights.items()
    }
    save_file(swapped, tmp_path / "model.safetensors", {"format": "pt"})
    assert relative(GemmaForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits) > 1e-2


def embedding_gradient(model: GemmaForCausalLM, ids: Tensor) -> Tensor:
    model.zero_grad()
    model.train()(ids, labels=ids).loss.backward()
    return model.model.embed_tokens.weight.grad.clone()


@pytest.mark.parametrize("shape", [FIRST, SECOND])
def test_fault_13_the_pad_row_is_a_row_like_any_other(shape: str) -> None:
    """Under another numbering of the vocabulary its gradient is the same: it is neither zeroed nor skipped."""
    model, ids = ours(shape, dtype=torch.float64), token_rows()
    pad, other = model.config.pad_token_id, 50
    ids[0, 3:6] = pad
    ids[1, 7] = other
    renumber = torch.arange(model.config.vocab_size)
    renumber[[pad, other]] = renumber[[other, pad]]
    found = embedding_gradient(model, ids)
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data[renumber]
    assert relative(found, embedding_gradient(model, renumber[ids])[renumber]) < 1e-12
    assert found[pad].abs().max() > 0.01 * found.abs().max()
    absent = token_rows()
    assert embedding_gradient(model, absent)[pad].any(), "the head must learn not to emit it"


@pytest.mark.parametrize("shape", [FIRST, SECOND])
def test_fault_13_a_fresh_model_does_not_zero_the_pad_row(shape: str) -> None:
    torch.manual_seed(0)
    model = GemmaForCausalLM(tiny_config(shape))
    embedding = model.model.embed_tokens
    assert embedding.padding_idx is None
    assert embedding.weight.std(dim=1).min() > 0.5 * model.config.initializer_range
    assert all(not weight.any() for name, weight in model.named_parameters() if "norm" in name), "stored as weight - 1"
