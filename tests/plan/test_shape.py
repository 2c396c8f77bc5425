"""Sizes without torch are the sizes of real models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    VaultGemmaConfig,
)

from gemma_ft.errors import UserError
from gemma_ft.families.records import PRESETS
from gemma_ft.model.config import GemmaNumerics, config_in
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.model.layers import GemmaRMSNorm, layer_angles
from gemma_ft.plan.shape import Shape, preset_shape, shape_in, shape_of


def on_meta(name: str) -> GemmaForCausalLM:
    with torch.device("meta"):
        return GemmaForCausalLM(PRESETS[name].config())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_weights_and_windows_of_its_model(name: str) -> None:
    shape, model = preset_shape(name), on_meta(name)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.windows == model.model.numerics.window_tokens
    ids = torch.zeros((1, 3), dtype=torch.long)
    assert shape.angles == len({id(one) for one in layer_angles(ids, model.model.numerics.layers, torch.float32)})
    assert (shape.vocabulary, shape.max_positions) == (model.config.vocab_size, model.config.max_position_embeddings)
    layer = model.model.layers[0]
    norms = [one.weight.numel() for one in layer.modules() if isinstance(one, GemmaRMSNorm)]
    assert (shape.layer_norms, shape.norms) == (sum(norms), norms.count(shape.hidden))
    assert {one: tuple(layer.get_submodule(f"{room}.{one}").weight.shape)
            for room, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
            for one in (f"{letter}_proj" for letter in names)} == shape.linears  # fmt: skip


@pytest.mark.parametrize(
    ("targets", "dora"), [(None, False), (None, True), (["q_proj", "v_proj"], False), (["down_proj"], True)]
)
def test_an_adapter_has_the_weights_that_peft_gives_it(targets: list[str] | None, dora: bool) -> None:
    config = LoraConfig(r=5, target_modules=targets or "all-linear", task_type="CAUSAL_LM", use_dora=dora)
    with torch.device("meta"):
        model = get_peft_model(on_meta("gemma-tiny"), config)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert preset_shape("gemma-tiny").adapter(5, targets, dora=dora) == trained


def test_a_folder_has_the_shape_of_its_config(tmp_path: Path) -> None:
    for name in ("gemma-2b", "gemma-2-27b"):
        config = PRESETS[name].config(vocab_size=1000, num_hidden_layers=3)
        config.save_pretrained(tmp_path)
        shape = shape_in(tmp_path)
        assert (shape.layers, shape.vocabulary) == (3, 1000)
        second = name == "gemma-2-27b"
        assert (shape.norms, shape.attn_softcap, shape.final_softcap) == (4 if second else 2, second, second)
        assert shape.windows == GemmaNumerics.from_config(config).window_tokens


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"model_type": "llama"}', "not of Gemma 1, 2, 3 or VaultGemma"),
        ('{"model_type": "gemma", "num_hidden_layers": 0}', "num_hidden_layers 0 is no size; fetch the file again"),
        ("[]", "not of Gemma 1, 2, 3 or VaultGemma"),
        ("nothing", "cannot be read as a Gemma's: Expecting value: line 1 column 1 (char 0)"),
    ],
)
def test_another_config_is_refused_in_one_line(text: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as raised:
        shape_in(tmp_path)
    assert str(raised.value) == f"{path}: {line}"


def test_a_config_that_leaves_fields_out_is_read_with_the_defaults_of_transformers(tmp_path: Path) -> None:
    fields = {"model_type": "gemma2", **PRESETS["gemma-2-2b"].fields}
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    shape = shape_in(tmp_path)
    assert shape.windows == preset_shape("gemma-2-2b").windows
    assert shape.parameters == preset_shape("gemma-2-2b").parameters


@pytest.mark.parametrize("config", [GemmaConfig, Gemma2Config, Gemma3TextConfig, VaultGemmaConfig])
def test_an_empty_config_is_that_of_transformers_class(config: type[GemmaConfig], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": config.model_type}), encoding="utf-8")
    shape, expected = shape_in(tmp_path), config()
    found = (shape.layers, shape.hidden, shape.ffn, shape.heads, shape.kv_heads, shape.head_dim, shape.vocabulary)
    assert found == (
        expected.num_hidden_layers, expected.hidden_size, expected.intermediate_size, expected.num_attention_heads,
        expected.num_key_value_heads, expected.head_dim, expected.vocab_size,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "published"), [("gemma-3-4b", 4_300_079_472), ("gemma-3-12b", 12_187_325_040),
                                                ("gemma-3-27b", 27_432_406_640)])  # fmt: skip
def test_what_lies_beside_a_text_model_makes_up_the_published_folder(name: str, published: int) -> None:
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
              "image_size": 896, "patch_size": 14, "vision_use_head": False}  # fmt: skip
    config = Gemma3Config(text_config=PRESETS[name].config().to_dict(), vision_config=vision)
    with torch.device("meta"):
        whole = sum(one.numel() for one in Gemma3ForConditionalGeneration(config).parameters())
    shape = preset_shape(name)
    assert (whole, shape.parameters + shape.beside, shape.text_only) == (published, published, True)


# As folders on the hub were first written: what is not said is the config class's own.
OLD_4B = {"model_type": "gemma3", "mm_tokens_per_image": 256, "vision_config": {"hidden_size": 1152},
          "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
                          "num_hidden_layers": 34, "sliding_window": 1024,
                          "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}}  # fmt: skip
OLD_1B = {"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
          "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262_144,
          "max_position_embeddings": 32_768, "sliding_window": 512, "sliding_window_pattern": 6,
          "rope_theta": 1_000_000, "rope_local_base_freq": 10_000, "rope_scaling": None, "query_pre_attn_scalar": 256,
          "final_logit_softcapping": None, "attn_logit_softcapping": None}  # fmt: skip
UNLIKE_ANY = {"model_type": "gemma3_text", "num_hidden_layers": 5, "sliding_window_pattern": 2,
              "final_logit_softcapping": 20.0, "rope_local_base_freq": 1_000_000.0}  # fmt: skip


@pytest.mark.parametrize("fields", [OLD_4B, OLD_1B, UNLIKE_ANY], ids=["old 4B", "old 1B", "unlike any"])
def test_a_raw_config_has_the_shape_of_what_transformers_reads(fields: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    config = config_in(tmp_path)
    assert replace(shape_in(tmp_path), text_only=False) == shape_of(tmp_path.name, config.to_dict())
    with torch.device("meta"):
        model = GemmaForCausalLM(config)
    assert shape_in(tmp_path).parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape_in(tmp_path).final_softcap == (model.model.numerics.final_softcap is not None)


@pytest.mark.parametrize(("fields", "preset"), [(OLD_4B, "gemma-3-4b"), (OLD_1B, "gemma-3-1b")])
def test_a_published_folder_has_the_shape_of_its_preset_in_either_spelling(
    fields: dict[str, Any], preset: str, tmp_path: Path
) -> None:
    def found() -> Shape:
        shape = shape_in(tmp_path)
        assert shape.text_only == (fields is OLD_4B)
        return replace(shape, name=preset, beside=preset_shape(preset).beside)

    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    assert found() == preset_shape(preset)
    config = PRESETS[preset].config()
    (Gemma3Config(text_config=config.to_dict()) if fields is OLD_4B else config).save_pretrained(tmp_path)
    assert "rope_parameters" in (tmp_path / "config.json").read_text(encoding="utf-8")
    assert found() == preset_shape(preset)
