"""VaultGemma: its folder by its own names, and never taken for the Gemma 2 that it resembles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_ft.errors import UserError
from gemma_ft.model.config import GemmaNumerics
from gemma_ft.model.gemma import Gemma2ForCausalLM, GemmaForCausalLM, VaultGemmaForCausalLM
from tests.parity.amplified import SECOND, VAULT, ours, reference, relative, tiny_config, token_rows

LAYER = "model.layers.0."


def saved(shape: str, folder: Path) -> dict[str, Tensor]:
    ours(shape).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def kept(weights: dict[str, Tensor], folder: Path) -> None:
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as raised:
        GemmaForCausalLM.from_pretrained(folder)
    return str(raised.value).removeprefix(f"{folder}: ")


def test_its_folder_opens_and_is_saved_under_its_own_names(tmp_path: Path) -> None:
    reference(VAULT).save_pretrained(tmp_path / "theirs")
    model = GemmaForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32).eval()
    assert type(model) is VaultGemmaForCausalLM
    assert relative(model(token_rows()).logits, reference(VAULT)(token_rows()).logits) <= 1e-5
    model.save_pretrained(tmp_path / "ours")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert first.keys() == second.keys()
    assert {name for name in second if name.startswith(LAYER) and "norm" in name} == {
        f"{LAYER}input_layernorm.weight", f"{LAYER}pre_feedforward_layernorm.weight"
    }  # fmt: skip
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("vaultgemma", ["VaultGemmaForCausalLM"])


def test_it_has_both_caps_one_base_and_the_windows_of_its_file() -> None:
    numerics = GemmaNumerics.from_config(tiny_config(VAULT))
    assert (numerics.attn_softcap, numerics.final_softcap, numerics.qk_norms) == (50.0, 30.0, False)
    assert numerics.window_tokens == (8, None, 8)
    assert {kind.rope.theta for kind in numerics.layers} == {10_000.0}
    every_other = GemmaNumerics.from_config(tiny_config(VAULT, layer_types=None, num_hidden_layers=4))
    assert every_other.window_tokens == (8, None, 8, None)
    assert ours(VAULT).config._attn_implementation == "blockwise", "SDPA has no cap"


@pytest.mark.parametrize("dropped", ["post_attention_layernorm", "post_feedforward_layernorm"])
def test_a_gemma_2_without_its_post_norms_is_refused(dropped: str, tmp_path: Path) -> None:
    """Zeros in their place would be norms: under 1 + w they change every layer."""
    weights = saved(SECOND, tmp_path)
    kept({name: value for name, value in weights.items() if dropped not in name}, tmp_path)
    names = ", ".join(f"model.layers.{index}.{dropped}.weight" for index in range(3))
    assert refusal(tmp_path) == f"missing keys in the weights: {names}"


def as_another(folder: Path, shape: str) -> None:
    """The folder's config.json is that of `shape`, whose sizes are those of the weights."""
    sizes = json.loads((folder / "config.json").read_text())
    fields = {**tiny_config(shape).to_dict(), **{name: sizes[name] for name in SAME}}
    (folder / "config.json").write_text(json.dumps(fields))


SAME = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "query_pre_attn_scalar", "layer_types")


def test_a_vaultgemma_is_no_gemma_2_and_a_gemma_2_no_vaultgemma(tmp_path: Path) -> None:
    saved(VAULT, tmp_path / "vault")
    as_another(tmp_path / "vault", SECOND)
    assert refusal(tmp_path / "vault") == (
        "missing keys in the weights: model.layers.0.post_attention_layernorm.weight, "
        "model.layers.0.post_feedforward_layernorm.weight, model.layers.1.post_attention_layernorm.weight and 3 more"
    )
    saved(SECOND, tmp_path / "second")
    as_another(tmp_path / "second", VAULT)
    assert refusal(tmp_path / "second") == (
        "unexpected keys in the weights: model.layers.0.post_attention_layernorm.weight, "
        "model.layers.0.post_feedforward_layernorm.weight, model.layers.1.post_attention_layernorm.weight and 3 more"
    )


def test_gemma_1s_name_of_the_norm_before_the_mlp_is_not_its(tmp_path: Path) -> None:
    """It does the same work, and is another tensor."""
    weights = saved(VAULT, tmp_path)
    renamed = {name.replace("pre_feedforward", "post_attention"): value for name, value in weights.items()}
    kept(renamed, tmp_path)
    names = ", ".join(f"model.layers.{index}.pre_feedforward_layernorm.weight" for index in range(3))
    assert refusal(tmp_path) == f"missing keys in the weights: {names}"


@pytest.mark.parametrize(("face", "shape"), [(Gemma2ForCausalLM, VAULT), (VaultGemmaForCausalLM, SECOND)])
def test_the_class_of_another_family_is_refused(face: Any, shape: str, tmp_path: Path) -> None:
    saved(shape, tmp_path)
    config = tiny_config(shape)
    right = {VAULT: "VaultGemmaForCausalLM", SECOND: "Gemma2ForCausalLM"}[shape]
    message = f"config.json: a {right}, not a {face.__name__}; use GemmaForCausalLM for any Gemma"
    for build in (lambda: face(config), lambda: face.from_pretrained(tmp_path)):
        with pytest.raises(UserError) as raised:
            build()
        assert str(raised.value) == message
    assert type(GemmaForCausalLM(config)).__name__ == right
