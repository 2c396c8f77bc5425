"""Folders move both ways with equal logits: transformers opens what we save, we open what it saves, sharded or nf4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from gemma_ft.model.gemma import GemmaForCausalLM
from tests.parity.amplified import ONE_OF_EACH, TOKENS, ours, reference, relative, tiny_config, token_rows

FIXTURES = Path(__file__).parents[1] / "fixtures"
TOLERANCE = 1e-5
CLASSES = ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "VaultGemmaForCausalLM")
ARCHITECTURE = dict(zip(ONE_OF_EACH, CLASSES, strict=True))
FAMILIES = pytest.mark.parametrize("shape", ONE_OF_EACH)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(token_rows()).logits.float()


def architecture(folder: Path) -> list[str]:
    return json.loads((folder / "config.json").read_text())["architectures"]


@FAMILIES
def test_transformers_opens_what_we_save(shape: str, tmp_path: Path) -> None:
    ours(shape).save_pretrained(tmp_path)
    assert architecture(tmp_path) == [ARCHITECTURE[shape]]
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors"), "the tied head is stored once"
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert type(stock).__module__.startswith("transformers.")
    assert not any(info.values()), info
    assert relative(logits(ours(shape)), logits(stock)) <= TOLERANCE


@FAMILIES
def test_we_open_what_transformers_saves(shape: str, tmp_path: Path) -> None:
    reference(shape).save_pretrained(tmp_path)
    model = GemmaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(model).__name__ == ARCHITECTURE[shape]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert relative(logits(model), logits(reference(shape))) <= TOLERANCE
    model.save_pretrained(tmp_path / "again")
    assert architecture(tmp_path / "again") == [ARCHITECTURE[shape]]
    first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@FAMILIES
def test_sharded_folders_open_whole(shape: str, tmp_path: Path) -> None:
    reference(shape).save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert torch.equal(logits(GemmaForCausalLM.from_pretrained(tmp_path)), logits(ours(shape)))


@FAMILIES
def test_a_prebuilt_config_and_a_dtype_are_respected(shape: str, tmp_path: Path) -> None:
    ours(shape).save_pretrained(tmp_path)
    config = tiny_config(shape, attn_implementation="eager")
    model, info = GemmaForCausalLM.from_pretrained(
        tmp_path, config=config, dtype=torch.bfloat16, output_loading_info=True
    )
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert not info["missing_keys"]


@FAMILIES
def test_nf4_loads_through_transformers_quantization_and_equals_stock(shape: str, tmp_path: Path) -> None:
    import bitsandbytes as bnb

    ours(shape).save_pretrained(tmp_path)
    wanted = {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
        "dtype": torch.float32,
    }
    model = GemmaForCausalLM.from_pretrained(tmp_path, **wanted)
    quantized = [name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(quantized) == 3 * 7
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", **wanted)
    for module in (*model.modules(), *stock.modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # else some CPUs repack the weight, which needs larger shapes
    assert relative(logits(model), logits(stock)) <= TOLERANCE
    assert relative(logits(model), logits(ours(shape))) > 1e-2, "nothing was quantized"


@pytest.mark.parametrize("name", ["gemma-2b", "gemma-7b", "gemma-2-27b"])
def test_published_config_files_give_the_right_numerics(name: str, tmp_path: Path) -> None:
    """The published file with only its sizes shrunk: top-level rope_theta, legacy activation names, old dtype key."""
    published = json.loads((FIXTURES / name / "config.json").read_text())
    small = tiny_config(name).to_dict()
    sizes = {key: value for key, value in small.items() if isinstance(value, int) and published.get(key) != value}
    sizes.pop("tie_word_embeddings", None)
    assert "rope_parameters" not in published
    reference(name).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**published, **sizes}))
    model = GemmaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert relative(logits(model), logits(reference(name))) <= TOLERANCE
    assert GemmaForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16, "torch_dtype is the published default"
    wanted = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = reference(name).generate(token_rows(), **wanted)
    assert torch.equal(model.generate(token_rows(), **wanted), expected), "also with the file's cache_implementation"
    assert expected.shape[1] == TOKENS + 12
