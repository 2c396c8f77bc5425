"""Adapters of a multimodal base: stock PEFT puts ours on the whole class, and ours puts PEFT's on the text model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from gemma_ft.adapters.class_names import rename_folder
from gemma_ft.build.located import Source
from gemma_ft.build.place import AdapterFiles, place_of
from gemma_ft.build.pretrained import load_base, load_model
from gemma_ft.errors import UserError
from gemma_ft.export.adapter_folder import vllm_notes
from gemma_ft.export.merge.merged import merged_weights
from gemma_ft.model.config_file import composite_in
from tests.export.tuned import wrap
from tests.multimodal import image_inputs, reference, save_multimodal
from tests.parity.amplified import relative

IDS = torch.randint(8, 300, (1, 40), generator=torch.Generator().manual_seed(0))
PREFIX = "base_model.model.model.language_model."
LAYER_2 = r"model\.language_model\.layers\.2\.self_attn\.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_multimodal(tmp_path_factory.mktemp("base") / "base")


def saved(wrapped: Any, base: Path, folder: Path) -> torch.Tensor:
    """Write an adapter as PEFT does; returns the live model's logits."""
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.eval().save_pretrained(folder)
    logits: torch.Tensor = wrapped(input_ids=IDS).logits.detach()
    return logits


def ours(base: Path, folder: Path, **settings: Any) -> torch.Tensor:
    """An adapter on our model of `base`, saved as a run saves it."""
    model = load_base(Source(str(base), None), dtype=torch.float32)
    logits = saved(wrap(model, task_type="CAUSAL_LM", **settings), base, folder)
    composite = composite_in(base)
    assert composite is not None
    rename_folder(folder, composite)
    return logits


OURS: dict[str, dict[str, Any]] = {
    "all linear": {},
    "two of them": {"target_modules": ["q_proj", "v_proj"]},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "rslora": {"target_modules": ["down_proj", "q_proj"], "use_rslora": True},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["v_proj"]},
    "rows of tokens": {"trainable_token_indices": [10, 11], "ensure_weight_tying": True},
    "ranks": {"target_modules": ["q_proj"], "rank_pattern": {"model.layers.2.self_attn.q_proj": 2}},
}


@pytest.mark.parametrize("case", OURS)
def test_stock_peft_puts_ours_on_the_whole_class(case: str, base: Path, tmp_path: Path) -> None:
    live = ours(base, tmp_path / "adapter", **OURS[case])
    whole, image = reference(base), image_inputs(IDS)
    before = whole.get_image_features(image["pixel_values"]).pooler_output
    wrapped = PeftModel.from_pretrained(whole, tmp_path / "adapter").eval()
    assert relative(wrapped(input_ids=IDS).logits, live) < 1e-5
    after = wrapped.base_model.model.get_image_features(image["pixel_values"]).pooler_output
    assert torch.equal(before, after)
    tuned = [name for name, _ in wrapped.named_parameters() if "lora_" in name or "modules_to_save" in name]
    assert not [name for name in tuned if "vision_tower" in name or "projector" in name]
    assert torch.equal(load_model(tmp_path / "adapter", dtype=torch.float32)(input_ids=IDS).logits, live)


def test_the_names_are_those_of_the_class(base: Path, tmp_path: Path) -> None:
    ours(base, tmp_path, target_modules=["q_proj", "v_proj"])
    names = list(load_file(tmp_path / "adapter_model.safetensors"))
    assert {name.partition("layers.")[0] for name in names} == {PREFIX}
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["target_modules"] == r"model\.language_model\..*\.(q_proj|v_proj)"
    assert vllm_notes(fields, names) == []
    assert set(AdapterFiles(tmp_path).config.target_modules) == {
        f"model.layers.{layer}.self_attn.{one}" for layer in range(7) for one in ("q_proj", "v_proj")
    }


THEIRS: dict[str, dict[str, Any]] = {
    "a pattern": {"target_modules": r".*language_model.*\.(q_proj|down_proj)"},
    "without a task": {"target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj)).*?"},
    "the tower left out": {"target_modules": ["q_proj"], "exclude_modules": r".*vision_tower.*"},
    "ranks and whole weights": {
        "target_modules": r".*language_model.*\.q_proj",
        "rank_pattern": {LAYER_2: 2},
        "alpha_pattern": {LAYER_2: 3},
        "modules_to_save": ["model.language_model.layers.0.mlp.up_proj"],
    },
    "dora": {"target_modules": r".*language_model.*\.(q_proj|down_proj)", "use_dora": True},
    "full names": {"target_modules": ["model.language_model.layers.1.mlp.up_proj"]},
    "rows of tokens": {
        "target_modules": r".*language_model.*\.q_proj",
        "trainable_token_indices": {"model.language_model.embed_tokens": [10, 11]},
        "ensure_weight_tying": True,
    },
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("case", THEIRS)
def test_ours_puts_theirs_on_the_text_model(case: str, old: bool, base: Path, tmp_path: Path) -> None:
    """Saved from the whole class by stock PEFT, under the names of today's transformers and of those before 4.52."""
    settings = {"task_type": None if case == "without a task" else "CAUSAL_LM", **THEIRS[case]}
    live = saved(wrap(reference(base), **settings), base, tmp_path)
    if old:
        weights = load_file(tmp_path / "adapter_model.safetensors")
        renamed = {
            name.replace(".model.language_model.", ".language_model.model."): one for name, one in weights.items()
        }
        save_file(renamed, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    assert relative(load_model(tmp_path, dtype=torch.float32)(input_ids=IDS).logits, live) < 1e-5
    merged = merged_weights(place_of(tmp_path))
    model = load_base(Source(str(base), None), dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(merged.tensor(name))
    assert relative(model.eval()(IDS).logits, live) < 1e-5


def test_an_adapter_on_the_tower_is_refused(base: Path, tmp_path: Path) -> None:
    saved(wrap(reference(base), task_type="CAUSAL_LM", target_modules=["q_proj"]), base, tmp_path)
    with pytest.raises(UserError) as raised:
        load_model(tmp_path)
    assert str(raised.value) == (
        f"{tmp_path}: changes model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight, which is no part of "
        "the text model; train with target_modules that name layers of the language model alone"
    )


def test_the_names_of_a_text_model_alone_load_too(base: Path, tmp_path: Path) -> None:
    """As an adapter has them that was trained on the text model by itself."""
    model = load_base(Source(str(base), None), dtype=torch.float32)
    live = saved(wrap(model, task_type="CAUSAL_LM"), base, tmp_path)
    assert not AdapterFiles(tmp_path).renamed
    assert torch.equal(load_model(tmp_path, dtype=torch.float32)(input_ids=IDS).logits, live)


def test_saving_after_loading_keeps_the_names_of_a_text_model(base: Path, tmp_path: Path) -> None:
    """transformers remembers renamings of its loader, and would write names that are no model's."""
    load_base(Source(str(base), None), dtype=torch.float32).save_pretrained(tmp_path)
    assert min(load_file(tmp_path / "model.safetensors")) == "model.embed_tokens.weight"


def test_two_adapters_of_both_namings_are_put_on_one_base(base: Path, tmp_path: Path) -> None:
    ours(base, tmp_path / "a", target_modules=["q_proj"])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    plain = {name.replace("language_model.", ""): one for name, one in weights.items()}
    save_file(plain, tmp_path / "b" / "adapter_model.safetensors", {"format": "pt"})
    fields = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps({**fields, "target_modules": ["q_proj"]}))
    logits = [load_model(tmp_path / one, dtype=torch.float32)(input_ids=IDS).logits for one in ("a", "b")]
    assert torch.equal(*logits)
    merged = merged_weights(place_of(base), adapters=[(tmp_path / "a", 0.5), (tmp_path / "b", 0.5)])
    alone = merged_weights(place_of(tmp_path / "a"))
    name = "model.layers.3.self_attn.q_proj.weight"
    assert torch.allclose(merged.tensor(name), alone.tensor(name), atol=1e-6)
