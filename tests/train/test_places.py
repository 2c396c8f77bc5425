"""What the name of a model may stand for, and that an adapter is put on the base it was trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_ft.contract import Contract
from gemma_ft.errors import UserError
from gemma_ft.load import load_model, place_of
from gemma_ft.recipe.load import LoadedRecipe
from gemma_ft.weights import Source, WeightFiles

RecipeFor = Callable[..., LoadedRecipe]
Train = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(recipe_for: RecipeFor, train: Train) -> Path:
    loaded = recipe_for("train.max_steps=1", "quantize.double_quant=false")
    train(loaded)
    return Path(loaded.recipe.output_dir)


def test_a_run_an_adapter_a_folder_and_a_hub_id(run: Path, small_gemma: Path) -> None:
    base = Source(str(small_gemma), None)
    contract = Contract.read(run / "adapter")
    assert contract is not None
    assert (contract.base, contract.preset) == (str(small_gemma), "gemma-tiny")
    assert (contract.quantize, contract.double_quant) == ("nf4", False)
    assert contract.base_sha256 == WeightFiles.open(small_gemma).fingerprint()
    for name in (run, run / "adapter"):
        place = place_of(name)
        assert (place.base, place.adapter, place.contract) == (base, run / "adapter", contract)
    assert place_of(small_gemma, run / "adapter").adapter == run / "adapter"
    plain = place_of(small_gemma)
    assert (plain.base, plain.adapter, plain.folder, plain.contract) == (base, None, small_gemma, None)
    hub = place_of("google/gemma-2b")
    assert (hub.base, hub.adapter, hub.folder, hub.contract) == (Source("google/gemma-2b", None), None, None, None)


def test_auto_is_the_quantization_of_the_training(run: Path, small_gemma: Path) -> None:
    def linear(**options: Any) -> tuple[str, bool | None]:
        layer = load_model(run, dtype=torch.float32, **options).get_base_model().model.layers[0].mlp.up_proj.base_layer
        return type(layer).__name__, getattr(getattr(layer.weight, "quant_state", None), "nested", None)

    assert linear() == ("Linear", None)
    assert linear(quantize="auto") == ("Linear4bit", False)
    assert linear(quantize="int8") == ("Linear8bitLt", None)
    plain = load_model(small_gemma, dtype=torch.float32, quantize="auto")
    assert type(plain.model.layers[0].mlp.up_proj).__name__ == "Linear"


def test_an_adapter_is_refused_on_another_base(run: Path, small_gemma: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(small_gemma, other)
    weights = load_file(str(other / "model.safetensors"))
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, name: weights[name] * 1.01}, str(other / "model.safetensors"), metadata={"format": "pt"})
    found = WeightFiles.open(other).fingerprint()
    expected = WeightFiles.open(small_gemma).fingerprint()
    message = (
        f"{run / 'adapter'}: was trained on {small_gemma} with fingerprint {expected[:12]}, but {other} has "
        f"{found[:12]} (gemma_ft.json); give the base that it was trained on"
    )
    with pytest.raises(UserError) as caught:
        load_model(other, adapter=run / "adapter")
    assert str(caught.value) == message
    # the same when the adapter itself names the other base
    config = run / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(other)}))
    with pytest.raises(UserError) as caught:
        load_model(run)
    assert str(caught.value) == message


def test_a_base_that_is_not_there_is_one_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        place_of(tmp_path / "nowhere", run / "adapter")
    assert str(caught.value) == (
        f"{tmp_path / 'nowhere'}: no such folder; name a folder with a model, or a hub id (owner/name)"
    )


def test_an_adapter_without_tokenizer_files_takes_the_base_tokenizer(
    run: Path, small_gemma: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):  # what stock PEFT saves
        shutil.copyfile(run / "adapter" / name, plain / name)
    place = place_of(plain)
    assert (place.adapter, place.folder, place.contract) == (plain, small_gemma, None)
    assert place_of(small_gemma, run).adapter == run / "adapter"  # a run stands for its adapter here as well
