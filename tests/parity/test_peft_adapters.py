"""Adapters of other tools: what PEFT computes with them on transformers' Gemma, from the folder that PEFT saved.

Source of every right value: peft 0.21.2's PeftModel on transformers 5.24's Gemma classes.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model

from gemma_ft.adapters.lora import adapter_off
from gemma_ft.build.pretrained import load_model
from tests.parity.amplified import FIRST, SECOND, THIRD, reference, relative, token_rows

TOLERANCE = 1e-5
Q = {"target_modules": ["q_proj"]}
KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "biases of lora": {"lora_bias": True},
    "biases that there are not": {"bias": "all"},
    "some layers": {**Q, "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "patterns": {**Q, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}},
    "exclusion": {"exclude_modules": ["q_proj"]},
    "names by a pattern": {"target_modules": r".*layers\.[01]\..*(q|down)_proj"},
    "other layout": {"fan_in_fan_out": True},
    "dropout": {"lora_dropout": 0.3},
    "gaussian": {"init_lora_weights": "gaussian"},
    "eva": {"init_lora_weights": "eva"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "mica on the embedding": {"init_lora_weights": "mica", "target_modules": ["embed_tokens"]},
    "velora": {"velora_config": {"num_groups": 8}},
    "monteclora": {"monteclora_config": {"num_samples": 2, "buffer_size": 2}},
    "block diagonals": {**Q, "use_bdlora": {"target_modules_bd_b": ["q_proj"], "nblocks": 2}},
    "parameters": {"target_modules": ["v_proj"], "target_parameters": ["mlp.up_proj.weight"]},
    "rows of tokens": {**Q, "trainable_token_indices": [10, 11, 12]},
    "rows here and there": {**Q, "trainable_token_indices": {"embed_tokens": [10, 40, 12]}},
    "rows and a norm": {**Q, "trainable_token_indices": [10], "modules_to_save": ["norm"]},
    "rows of the head": {**Q, "trainable_token_indices": {"lm_head": [10, 11]}},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "embedding, tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "embedding, dora": {"target_modules": ["embed_tokens"], "use_dora": True},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True},
    "head": {"target_modules": ["lm_head"], "use_dora": True},
    "whole embedding": {**Q, "modules_to_save": ["embed_tokens"]},
    "whole embedding, tied": {**Q, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "whole head": {**Q, "modules_to_save": ["lm_head"]},
    "whole norms": {**Q, "modules_to_save": ["input_layernorm", "norm"]},
    "whole linear layers": {**Q, "modules_to_save": ["down_proj"]},
}


@pytest.fixture(scope="module", params=[FIRST, SECOND, THIRD])
def stock(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """transformers' amplified model of each family, and its folder."""
    model, folder = reference(request.param), tmp_path_factory.mktemp("stock") / request.param
    model.save_pretrained(folder)
    return model, folder


def saved(model: Any, base: Path, folder: Path, config: Any) -> Any:
    """An adapter with loud random weights as stock PEFT saves it, and opens it again."""
    torch.manual_seed(0)
    wrapped = get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, weight in sorted(wrapped.named_parameters()):
            if weight.requires_grad:
                change = 0.1 * torch.randn(weight.shape)
                weight.mul_(1 + change) if "magnitude" in name else weight.add_(change)
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(folder)
    return PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


def check(model: Any, base: Path, folder: Path, config: Any) -> None:
    """Adapter on, off, and on again; `model` is the base."""
    ids = token_rows()
    with torch.no_grad():
        expected, alone = saved(model, base, folder, config)(ids).logits, model(ids).logits
        loaded = load_model(folder, dtype=torch.float32)
        assert relative(loaded(ids).logits, expected) <= TOLERANCE
        with adapter_off(loaded):
            assert relative(loaded(ids).logits, alone) <= TOLERANCE
        assert relative(loaded(ids).logits, expected) <= TOLERANCE
    assert relative(alone, expected) > 1e-2, "the adapter changes hardly anything: a weak test"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_lora_with_its_options_is_what_peft_computes(kind: str, stock: tuple[Any, Path], tmp_path: Path) -> None:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **KINDS[kind]}
    check(*stock, tmp_path, LoraConfig(**settings))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer", ["embed_tokens", "lm_head"])
def test_rows_of_tokens_alone_are_what_peft_computes(layer: str, stock: tuple[Any, Path], tmp_path: Path) -> None:
    config = TrainableTokensConfig(token_indices=[10, 40, 12], target_modules=[layer], task_type="CAUSAL_LM")
    check(*stock, tmp_path, config)


def test_the_scale_is_rounded_once_for_the_rows_and_for_what_is_added(stock: tuple[Any, Path]) -> None:
    """In bf16, and under bf16's autocast over float32: what PEFT looks up is multiplied by the rounded sqrt(D)."""
    from gemma_ft.model.layers import GemmaScaledEmbedding

    table = GemmaScaledEmbedding(8, 26)  # sqrt(26) is no number of bf16's
    ids, rounded = torch.arange(8), torch.tensor(26**0.5, dtype=torch.bfloat16)
    assert float(rounded) != pytest.approx(26**0.5, rel=1e-4)
    assert table.embed_scale.dtype == torch.float32
    assert torch.equal(table(ids), table.weight * torch.tensor(26**0.5))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(table.embed_scale, rounded)
        assert torch.equal(table(ids), table.weight.bfloat16() * rounded)
    narrow = table.bfloat16()
    assert torch.equal(narrow.embed_scale, rounded)
    assert torch.equal(narrow(ids), narrow.weight * rounded)
    assert float(table.double().embed_scale) == 26**0.5
