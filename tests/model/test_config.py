"""PRESETS by their exact parameter counts, published config.json files, and configs that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers import Gemma2ForCausalLM as ReferenceGemma2
from transformers import GemmaForCausalLM as ReferenceGemma1

from gemma_ft.errors import UserError
from gemma_ft.families.records import PRESETS, PUBLISHED
from gemma_ft.model.config import GemmaNumerics
from gemma_ft.model.gemma import GemmaForCausalLM
from tests.parity.amplified import FIRST, SECOND, tiny_config

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_has_exactly_the_published_parameters(preset: str) -> None:
    config = PRESETS[preset].config()
    with torch.device("meta"):
        model = GemmaForCausalLM(config)
        stock = (ReferenceGemma1 if config.model_type == "gemma" else ReferenceGemma2)(PRESETS[preset].config())
    assert sum(weight.numel() for weight in model.parameters()) == PRESETS[preset].parameters
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    assert shapes == {name: tuple(weight.shape) for name, weight in stock.state_dict().items()}


def test_the_tiny_preset_is_all_of_gemma_2_and_not_mistaken_for_a_published_size() -> None:
    config = PRESETS["gemma-tiny"].config(vocab_size=2048)
    with torch.device("meta"):
        model = GemmaForCausalLM(config)
    assert sum(weight.numel() for weight in model.parameters()) <= 4_000_000
    assert config.num_hidden_layers not in (26, 42, 46)
    assert config.query_pre_attn_scalar == config.head_dim
    assert config.num_key_value_heads < config.num_attention_heads
    assert set(GemmaNumerics.from_config(config).window_tokens) == {64, None}


@pytest.mark.parametrize("name", ["gemma-2b", "gemma-7b", "gemma-2-27b"])
def test_a_published_config_equals_the_preset(name: str) -> None:
    published = AutoConfig.from_pretrained(FIXTURES / name)
    assert GemmaNumerics.from_config(published) == GemmaNumerics.from_config(PRESETS[name].config())
    with torch.device("meta"):
        assert sum(weight.numel() for weight in GemmaForCausalLM(published).parameters()) == PRESETS[name].parameters


def test_the_numbers_of_each_preset() -> None:
    scales = {name: GemmaNumerics.from_config(preset.config()).query_scale ** -2 for name, preset in PRESETS.items()}
    assert {name: round(scale, 6) for name, scale in scales.items()} == {
        "gemma-2b": 256, "gemma-7b": 256, "gemma-2-2b": 256, "gemma-2-9b": 256, "gemma-2-27b": 144, "gemma-tiny": 32,
    }  # fmt: skip
    for name, preset in PRESETS.items():
        config, numbers = preset.config(), GemmaNumerics.from_config(preset.config())
        second = preset.model_type == "gemma2"
        assert (numbers.attn_softcap, numbers.final_softcap) == ((50.0, 30.0) if second else (None, None)), name
        assert numbers.rope_theta == 10000.0
        assert config.rms_norm_eps == 1e-6
        assert config.tie_word_embeddings
        window = {"gemma-tiny": 64}.get(name, 4096) if second else None
        assert numbers.window_tokens[:4] == (window, None, window, None)


def test_an_old_top_level_rope_theta_is_read(tmp_path: Path) -> None:
    published = json.loads((FIXTURES / "gemma-2b" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**published, "rope_theta": 5000.0}))
    assert GemmaNumerics.from_config(AutoConfig.from_pretrained(tmp_path)).rope_theta == 5000.0


NOT_GELU = "config.json: activation 'silu' is not Gemma's tanh GELU; this is not a Gemma model"
REFUSED = {
    "another model": (LlamaConfig(), "model_type 'llama' is not Gemma 1 or 2; supported: gemma, gemma2"),
    "silu, Gemma 1": (tiny_config(FIRST, hidden_act="silu"), NOT_GELU),
    "silu, Gemma 2": (tiny_config(SECOND, hidden_activation="silu"), NOT_GELU),
    "relu": (
        tiny_config(SECOND, hidden_activation="relu"),
        "config.json: activation 'relu' is not Gemma's tanh GELU; this is not a Gemma model",
    ),
    "scaled positions": (
        tiny_config(FIRST, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
        "config.json: rope_type 'linear' is not supported; Gemma 1 and 2 use 'default'",
    ),
    "an encoder": (
        tiny_config(SECOND, use_bidirectional_attention=True),
        "config.json: use_bidirectional_attention is set; this is an encoder, not a causal Gemma",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_a_gemma_is_refused(case: str) -> None:
    config, message = REFUSED[case]
    for build in (GemmaNumerics.from_config, GemmaForCausalLM):
        with pytest.raises(UserError) as raised:
            build(config)
        assert str(raised.value) == message
