"""PRESETS by their exact parameter counts, published config.json files, and configs that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.configuration_utils import PreTrainedConfig

from gemma_ft.errors import UserError
from gemma_ft.families.family import Rope
from gemma_ft.families.records import PRESETS, PUBLISHED, family_of
from gemma_ft.model.config import GemmaNumerics
from gemma_ft.model.gemma import GemmaForCausalLM
from tests.parity.amplified import FIRST, SECOND, tiny_config

FIXTURES = Path(__file__).parents[1] / "fixtures"


def _loadable(config: PreTrainedConfig) -> PreTrainedConfig:
    """A VaultGemma's as transformers needs it: eager, for SDPA has no cap."""
    config._attn_implementation = "eager"
    return config


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_has_exactly_the_published_parameters(preset: str) -> None:
    config = PRESETS[preset].config()
    with torch.device("meta"):
        model = GemmaForCausalLM(config)
        stock = AutoModelForCausalLM.from_config(_loadable(PRESETS[preset].config()))
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
        "gemma-3-270m": 256, "gemma-3-1b": 256, "gemma-3-4b": 256, "gemma-3-12b": 256, "gemma-3-27b": 168,
        "vaultgemma-1b": 256,
    }  # fmt: skip
    for name, preset in PRESETS.items():
        config, numbers = preset.config(), GemmaNumerics.from_config(preset.config())
        capped = preset.model_type in ("gemma2", "vaultgemma")
        assert (numbers.attn_softcap, numbers.final_softcap) == ((50.0, 30.0) if capped else (None, None)), name
        assert config.rms_norm_eps == 1e-6
        assert config.tie_word_embeddings


WINDOWS = {
    "gemma": (None,) * 6, "vaultgemma": (None,) * 6, "gemma2": (4096, None) * 3, "gemma-tiny": (64, None) * 3,
    "gemma-3-270m": (512,) * 5 + (None,), "gemma-3-1b": (512,) * 5 + (None,), "gemma3_text": (1024,) * 5 + (None,),
}  # fmt: skip
LOCAL, GLOBAL, LONG = Rope(10_000.0), Rope(1_000_000.0), Rope(1_000_000.0, "linear", 8.0)
ROPES = {"gemma-3-270m": (LOCAL, GLOBAL), "gemma-3-1b": (LOCAL, GLOBAL), "gemma3_text": (LOCAL, LONG)}


@pytest.mark.parametrize("name", PRESETS)
def test_the_layers_of_each_preset(name: str) -> None:
    preset = PRESETS[name]
    numbers = GemmaNumerics.from_config(preset.config())
    assert numbers.window_tokens[:6] == WINDOWS.get(name, WINDOWS[preset.model_type])
    assert numbers.window_tokens[6:12] in (numbers.window_tokens[:6], ())
    sliding, full = ROPES.get(name, ROPES.get(preset.model_type, (LOCAL, LOCAL)))
    assert [kind.rope for kind in numbers.layers] == [full if w is None else sliding for w in numbers.window_tokens]
    assert numbers.layers == family_of(preset.model_type).layers(preset.fields), (
        "as the record says without transformers"
    )


def test_an_old_top_level_rope_theta_is_read(tmp_path: Path) -> None:
    published = json.loads((FIXTURES / "gemma-2b" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**published, "rope_theta": 5000.0}))
    assert GemmaNumerics.from_config(AutoConfig.from_pretrained(tmp_path)).layers[0].rope == Rope(5000.0)


NOT_GELU = "config.json: activation 'silu' is not Gemma's tanh GELU; this is not a Gemma model"
REFUSED = {
    "another model": (
        LlamaConfig(),
        "model_type 'llama' is not Gemma 1, 2, 3 or VaultGemma; "
        "supported: gemma, gemma2, gemma3_text, vaultgemma, gemma3",
    ),
    "silu, Gemma 1": (tiny_config(FIRST, hidden_act="silu"), NOT_GELU),
    "silu, Gemma 2": (tiny_config(SECOND, hidden_activation="silu"), NOT_GELU),
    "relu": (
        tiny_config(SECOND, hidden_activation="relu"),
        "config.json: activation 'relu' is not Gemma's tanh GELU; this is not a Gemma model",
    ),
    "scaled positions": (
        tiny_config(FIRST, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
        "config.json: rope_type 'linear' is not supported; Gemma 1 uses 'default'",
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
