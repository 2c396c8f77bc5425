"""Loading checks every name and shape, and the tied head stays tied: after load, wrap, a training step and copies."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_ft.errors import UserError
from gemma_ft.model.gemma import Gemma2ForCausalLM, GemmaForCausalLM
from tests.parity.amplified import FIRST, SECOND, ours, tiny_config, token_rows

Weights = dict[str, Tensor]
EMBEDDING = "model.embed_tokens.weight"


def without(*names: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: value for name, value in weights.items() if name not in names}


def changed(**new: Tensor) -> Callable[[Weights], Weights]:
    return lambda weights: {**weights, **{name.replace("__", "."): value for name, value in new.items()}}


UNTIED = (
    "lm_head.weight is not the embedding; every Gemma's head is tied to it: "
    "drop lm_head.weight from the weights and tie_word_embeddings from config.json"
)
BROKEN = {
    "missing": (without("model.norm.weight"), "missing keys in the weights: model.norm.weight"),
    "no embedding": (without(EMBEDDING), f"missing keys in the weights: lm_head.weight, {EMBEDDING}"),
    "many missing": (
        lambda weights: {name: value for name, value in weights.items() if "layers.2" not in name},
        "missing keys in the weights: model.layers.2.input_layernorm.weight, model.layers.2.mlp.down_proj.weight, "
        "model.layers.2.mlp.gate_proj.weight and 8 more",
    ),
    "unexpected": (
        changed(model__layers__3__mlp__up_proj__weight=torch.zeros(2)),
        "unexpected keys in the weights: model.layers.3.mlp.up_proj.weight",
    ),
    "a bias": (
        changed(model__layers__0__self_attn__q_proj__bias=torch.zeros(2)),
        "unexpected keys in the weights: model.layers.0.self_attn.q_proj.bias",
    ),
    "wrong shape": (
        changed(model__norm__weight=torch.zeros(3)),
        "mismatched keys in the weights: model.norm.weight is [3], config.json asks for [288]",
    ),
    "another head": (changed(lm_head__weight=torch.ones(101, 288)), UNTIED),
}


@pytest.mark.parametrize("case", BROKEN)
def test_weights_that_do_not_fit_are_refused_by_name(case: str, tmp_path: Path) -> None:
    change, message = BROKEN[case]
    ours(SECOND).save_pretrained(tmp_path)
    weights = change(load_file(tmp_path / "model.safetensors"))
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for more in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(UserError) as raised:
            GemmaForCausalLM.from_pretrained(tmp_path, **more)
        assert str(raised.value) == f"{tmp_path}: {message}"


def test_a_config_of_another_model_is_refused_before_any_weight_is_read(tmp_path: Path) -> None:
    for change, message in (
        (
            {"model_type": "llama"},
            "model_type 'llama' is not Gemma 1, 2, 3 or VaultGemma; "
            "supported: gemma, gemma2, gemma3_text, vaultgemma, gemma3",
        ),
        (
            {"hidden_activation": "silu"},
            "config.json: activation 'silu' is not Gemma's tanh GELU; this is not a Gemma model",
        ),
        (
            {"num_attention_heads": 0},
            "config.json: num_attention_heads 0 is no number of heads; fetch the file again",
        ),
    ):
        fields = {**tiny_config(SECOND).to_dict(), **change}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        with pytest.raises(UserError) as raised:
            GemmaForCausalLM.from_pretrained(tmp_path)
        assert str(raised.value) == message


def test_harmless_extras_load(tmp_path: Path) -> None:
    """An equal copy of the tied head, and the rotary buffer that older folders carry."""
    ours(FIRST).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights[EMBEDDING].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    model = GemmaForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model(token_rows()).logits, ours(FIRST)(token_rows()).logits)


@pytest.mark.parametrize("shape", [FIRST, SECOND])
def test_fault_16_the_head_stays_tied(shape: str, tmp_path: Path) -> None:
    def tied(model: GemmaForCausalLM) -> bool:
        return model.lm_head.weight is model.model.embed_tokens.weight

    ids, model = token_rows(), ours(shape)
    assert tied(model)
    before = model.lm_head.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(ids, labels=ids).loss.backward()
    optimizer.step()
    assert tied(model)
    assert not torch.equal(model.lm_head.weight, before), "full training trains the tied weight"
    model.save_pretrained(tmp_path)
    loaded = GemmaForCausalLM.from_pretrained(tmp_path)
    assert tied(loaded)
    assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)
    assert tied(copy.deepcopy(loaded))
    assert tied(loaded.to(torch.bfloat16))
    wrapped = get_peft_model(loaded, LoraConfig(r=4, target_modules="all-linear"))
    assert tied(wrapped.get_base_model())
    frozen = wrapped.get_base_model().lm_head.weight.clone()
    wrapped.train()(ids, labels=ids).loss.backward()
    torch.optim.SGD([w for w in wrapped.parameters() if w.requires_grad], lr=0.1).step()
    merged = wrapped.merge_and_unload()
    assert tied(merged)
    assert torch.equal(merged.lm_head.weight, frozen)


def test_the_class_follows_the_config() -> None:
    assert type(GemmaForCausalLM(tiny_config(FIRST))) is GemmaForCausalLM
    assert type(GemmaForCausalLM(tiny_config(SECOND))) is Gemma2ForCausalLM
    assert isinstance(GemmaForCausalLM(tiny_config(SECOND)), GemmaForCausalLM)
