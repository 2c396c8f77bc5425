"""From recipe to model: every shipped recipe, on the meta device; sources, presets and their errors."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.integrations import replace_with_bnb_linear

from gemma_ft.adapters.lora import add_adapter
from gemma_ft.adapters.quantize import quantization_config
from gemma_ft.build.inputs import build_tokenizer, weights_source
from gemma_ft.build.located import Source, model_source
from gemma_ft.build.model import build_model
from gemma_ft.build.pretrained import load_model
from gemma_ft.errors import UserError
from gemma_ft.families.records import PRESETS
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.model.linear import keep_trainable
from gemma_ft.recipe.load import load_recipe
from gemma_ft.recipe.schema import Recipe
from gemma_ft.system.shipped import shipped_recipes, shipped_root

DATA = shipped_root() / "data"
LINEARS_PER_LAYER = 7  # q, k, v, o, gate, up, down


def on_meta(recipe: Recipe) -> Any:
    """The recipe's model with its quantized layers and adapter, as shapes without memory."""
    config = PRESETS[recipe.model.preset].config(dtype=torch.bfloat16)
    with torch.device("meta"):
        model = GemmaForCausalLM(config)
        if recipe.quantize is not None:
            options = quantization_config(
                recipe.quantize.kind, double_quant=recipe.quantize.double_quant, compute_dtype=torch.bfloat16
            )
            model = replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=options)
        if recipe.adapter is None:
            return model
        settings = recipe.adapter.model_dump(exclude={"start"})
        return add_adapter(model, **settings, base="google/some-gemma", revision="abc")


@pytest.mark.parametrize("strategy", ["full", "lora", "qlora"])
@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda path: path.stem)
def test_every_shipped_recipe_builds_in_every_strategy(path: Path, strategy: str) -> None:
    recipe = load_recipe(path, [f"strategy={strategy}", "adapter={rank: 16, alpha: 32}"]).recipe
    model = on_meta(recipe)
    layers = PRESETS[recipe.model.preset].config().num_hidden_layers
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if strategy == "full":
        assert trained == {name for name, _ in model.named_parameters()}
        return
    assert len(trained) == layers * LINEARS_PER_LAYER * 2
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert keep_trainable(model) == (layers * LINEARS_PER_LAYER if strategy == "qlora" else 0)


def test_int8_is_a_shorthand_that_builds() -> None:
    recipe = load_recipe("sft_gemma2_2b", ["quantize=int8"]).recipe
    kinds = {type(module).__name__ for module in on_meta(recipe).modules()}
    assert "Linear8bitLt" in kinds
    assert "Linear4bit" not in kinds


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_knows_where_its_weights_are(preset: str) -> None:
    recipe = load_recipe("sft_tiny", [f"model.preset={preset}", "~model.weights"]).recipe
    source = weights_source(recipe)
    if preset == "gemma-tiny":
        assert Path(source.name).is_dir()
        assert Path(source.name).is_absolute()
    else:
        pretrained = "-pt" if preset.startswith("gemma-3-") and preset != "gemma-3-270m" else ""  # its name on the hub
        assert source == Source(f"google/{preset}{pretrained}", None)


def message(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_errors_name_the_key_and_the_cure(tmp_path: Path) -> None:
    assert message(model_source, "no/such/folder", key="model.weights: ") == (
        "model.weights: no/such/folder: no such folder; name a folder with a model, or a hub id (owner/name)"
    )
    recipe = load_recipe("sft_tiny", ["model.weights=random"]).recipe
    assert message(build_tokenizer, recipe) == (
        "model.tokenizer: fresh weights come without a tokenizer; name a folder or hub id"
    )
    assert message(load_model, tmp_path) == (
        f"{tmp_path}: neither a model, an adapter nor a finished run; expected config.json or adapter/ in it"
    )
    assert message(load_model, "data/gemma-tiny", quantize="int4") == (
        "quantize: expected nf4, int8 or auto, got 'int4'"
    )
    assert message(load_model, "data/gemma-tiny", adapter=tmp_path) == (
        f"{tmp_path}: no adapter_config.json in it; name a PEFT adapter folder, or a run with one"
    )


def test_fault_20_float16_is_refused() -> None:
    assert message(load_model, "data/gemma-tiny", dtype=torch.float16) == (
        "dtype: float16 overflows in Gemma, whose activations pass 65504; use bfloat16 or float32"
    )


def test_weights_of_another_size_are_refused() -> None:
    recipe = load_recipe("sft_gemma2_2b", ["model.weights=data/gemma-tiny", "strategy=lora"]).recipe
    folder = weights_source(recipe).name
    assert message(build_model, recipe, build_tokenizer(recipe)) == (
        f"model.preset: {folder} is not a gemma-2-2b (num_hidden_layers 6, not 26); set model.preset: gemma-tiny"
    )


def test_an_unreachable_hub_id_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the hub out of reach (HF_HUB_OFFLINE is set for the suite) and nothing in the cache."""
    recipe = load_recipe("sft_2b", ["model.tokenizer=data/gemma-tiny"]).recipe
    assert message(build_model, recipe, build_tokenizer(recipe)) == (
        "google/gemma-2b: not in the local cache and the hub cannot be reached; connect once, or name a local path"
    )


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    """Neither a model's nor an adapter's: each is refused before anything of it is read."""

    class Trap:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("a pickle was opened",))

    folder = broken(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    assert message(load_model, folder) == (
        f"{folder}/pytorch_model.bin: a pickle can run code when it is opened and is refused; "
        "convert it to safetensors where it was made"
    )
    adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "data/gemma-tiny"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    assert message(load_model, "data/gemma-tiny", adapter=folder) == (
        f"{folder}: no adapter_model.safetensors in it; other forms of weights are not opened"
    )


def test_code_in_a_model_folder_never_runs(tmp_path: Path) -> None:
    """Not even when somebody says yes to the question that transformers would ask."""
    folder = broken(tmp_path, model_type="custom", auto_map={"AutoConfig": "conf.Conf"})
    (folder / "conf.py").write_text("print('custom code ran')\nclass Conf: ...\n")
    script = f"from gemma_ft import load_model; load_model({str(folder)!r})"
    run = subprocess.run([sys.executable, "-c", script], input="y\n" * 9, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert "custom code ran" not in run.stdout + run.stderr
    assert "[y/N]" not in run.stdout + run.stderr
    assert "gemma_ft.errors.UserError: " in run.stderr


def test_a_word_in_a_folder_name_is_no_reason(tmp_path: Path) -> None:
    folder = tmp_path / "aggregated" / "offline"
    folder.mkdir(parents=True)
    (broken(folder) / "config.json").write_text('{"model_type": "gemma2", "head_dim": "x"}')
    assert message(load_model, folder).startswith(f"{folder}/config.json: cannot be read as a Gemma's: ")


def broken(tmp_path: Path, **changes: Any) -> Path:
    """A copy of the tiny Gemma's folder with other config fields (None removes one)."""
    config = json.loads((DATA / "gemma-tiny" / "config.json").read_text())
    config.update({key: value for key, value in changes.items() if value is not None})
    for key in [key for key, value in changes.items() if value is None]:
        config.pop(key)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((DATA / "gemma-tiny" / "model.safetensors").read_bytes())
    return tmp_path


def test_a_broken_folder_is_one_line(tmp_path: Path) -> None:
    for name, changes in {
        "other": {"model_type": "llama"},
        "none": {"model_type": None},
        "typed": {"head_dim": "x"},
    }.items():
        (tmp_path / name).mkdir()
        text = message(load_model, broken(tmp_path / name, **changes))
        assert text.startswith(f"{tmp_path / name}/config.json: cannot be read as a Gemma's: ")
        assert len(text.splitlines()) == 1
    folder = broken(tmp_path)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert message(load_model, folder).startswith(f"{folder}/model.safetensors: damaged or cut short (")
    (folder / "model.safetensors").unlink()
    assert message(load_model, folder) == f"{folder}: there is no model.safetensors in it, nor an index of shards"


def test_weights_that_are_asked_leave_their_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where torch gives memory in huge pages, and nothing else about them changes."""
    mapped = load_model("data/gemma-tiny")
    monkeypatch.setattr("gemma_ft.system.environment.huge_pages", lambda: True)
    moved = load_model("data/gemma-tiny")
    assert moved.lm_head.weight is moved.model.embed_tokens.weight
    weights = dict(moved.named_parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in mapped.named_parameters())
    pieces = {weight.untyped_storage().data_ptr() for weight in weights.values()}
    assert len(pieces) == 1, "of memory: small weights have no huge page of their own"
    assert all(weight.data_ptr() % 64 == 0 and weight.is_contiguous() for weight in weights.values())
