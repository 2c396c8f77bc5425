"""What the name of a model may stand for, and that an adapter is put on the base it was trained on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_ft.build.contract import Contract
from gemma_ft.build.located import Source
from gemma_ft.build.place import place_of
from gemma_ft.build.pretrained import load_model
from gemma_ft.build.weights import WeightFiles
from gemma_ft.errors import UserError
from gemma_ft.infer.session import open_session
from gemma_ft.recipe.load import LoadedRecipe
from gemma_ft.train.run import train_recipe
from tests.train.conftest import small_recipe

RecipeFor = Callable[..., LoadedRecipe]
Train = Callable[..., list[dict[str, Any]]]
HubCache = Callable[..., Path]


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubCache:
    """Puts copies of folders into a hub cache as one repository; returns its snapshot."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(name: str, *folders: Path) -> Path:
        commit = hashlib.sha1(name.encode()).hexdigest()
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        for folder in folders:
            shutil.copytree(folder, repository / "snapshots" / commit, dirs_exist_ok=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        return repository / "snapshots" / commit

    return put


@pytest.fixture(scope="module")
def trained(small_gemma: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    out = tmp_path_factory.mktemp("trained") / "run"
    loaded = small_recipe(small_gemma, rows, out, "train.max_steps=1", "quantize.double_quant=false")
    assert train_recipe(loaded) == 0
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, for tests to damage."""
    return shutil.copytree(trained, tmp_path / "run")


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


def test_the_contract_of_a_hub_id_is_read(run: Path, small_gemma: Path, tmp_path: Path, hub_cache: HubCache) -> None:
    contract = json.loads((run / "adapter" / "gemma_ft.json").read_text())
    (tmp_path / "contract").mkdir()
    (tmp_path / "contract" / "gemma_ft.json").write_text(json.dumps({**contract, "system": "drop"}))
    hub_cache("me/merged", small_gemma, tmp_path / "contract")
    found = place_of("me/merged").contract
    assert found is not None
    assert found.system == "drop"


def test_a_hub_id_is_what_its_files_are(run: Path, small_gemma: Path, hub_cache: HubCache) -> None:
    """A model, an adapter, or a model with an adapter in it, which would be put on unasked."""
    model, adapter = hub_cache("me/model", small_gemma), hub_cache("me/adapter", run / "adapter")
    plain = place_of("me/model")
    assert (plain.base, plain.adapter, plain.folder) == (Source("me/model", model.name), None, model)
    tuned = place_of("me/adapter")
    assert (tuned.base, tuned.adapter, tuned.folder) == (Source(str(small_gemma), None), adapter, adapter)
    assert tuned.contract == Contract.read(run / "adapter")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert load_model("me/adapter")(ids).logits.equal(load_model(run)(ids).logits)
    hub_cache("me/both", small_gemma, run / "adapter")
    with pytest.raises(UserError) as raised:
        load_model("me/both")
    assert str(raised.value) == (
        "me/both: an adapter lies in this model folder and would be put on unasked; move it to its own folder"
    )


def test_an_adapter_of_a_hub_base_is_pinned_to_its_commit(
    recipe_for: RecipeFor, train: Train, small_gemma: Path, hub_cache: HubCache
) -> None:
    model = hub_cache("me/model", small_gemma)
    loaded = recipe_for("train.max_steps=1", "model.weights=me/model")
    train(loaded)
    adapter = Path(loaded.recipe.output_dir) / "adapter"
    contract, config = Contract.read(adapter), json.loads((adapter / "adapter_config.json").read_text())
    assert contract is not None
    assert (contract.base, contract.revision) == ("me/model", model.name)
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/model", model.name)
    assert place_of(adapter).base == Source("me/model", model.name)


@pytest.mark.parametrize(("stored", "asked"), [("float32", torch.float32), (None, torch.bfloat16)])
def test_a_session_computes_as_it_was_trained(run: Path, stored: str | None, asked: torch.dtype) -> None:
    path = run / "adapter" / "gemma_ft.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "precision": stored}))
    assert open_session(run).model.get_input_embeddings().weight.dtype == asked
    assert open_session(run, dtype=torch.bfloat16).model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_auto_is_the_quantization_of_the_training(run: Path, small_gemma: Path) -> None:
    def linear(**options: Any) -> tuple[str, bool | None]:
        layer = load_model(run, dtype=torch.float32, **options).get_base_model().model.layers[0].mlp.up_proj.base_layer
        return type(layer).__name__, getattr(getattr(layer.weight, "quant_state", None), "nested", None)

    assert linear() == ("Linear", None)
    assert linear(quantize="auto") == ("UnpackedLinear4bit", False)
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


def changed(run: Path, to: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """A copy of a run's adapter with other tensors, and a contract that knows no hash of them."""
    shutil.copytree(run / "adapter", to)
    path = to / "adapter_model.safetensors"
    save_file(edit(load_file(str(path))), str(path))
    contract = json.loads((to / "gemma_ft.json").read_text())
    (to / "gemma_ft.json").write_text(json.dumps({**contract, "adapter_sha256": None}))
    return to


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_model(*arguments, **options)
    return str(caught.value)


def test_an_adapter_is_whole_or_refused(run: Path, tmp_path: Path) -> None:
    """PEFT would load what there is, and go on with a warning."""
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    part = changed(run, tmp_path / "part", lambda tensors: {key: tensors[key] for key in tensors if key != name})
    assert refused(part) == (
        f"{part}/adapter_model.safetensors: has no tensor {name}; the adapter is not whole, or another base's"
    )
    more = changed(run, tmp_path / "more", lambda tensors: {**tensors, "x": torch.ones(1)})
    assert refused(more) == (
        f"{more}/adapter_model.safetensors: x belongs to no layer of its base; the adapter is not whole, or another "
        "base's"
    )
    other = changed(
        run, tmp_path / "other", lambda tensors: {key: one[:, :1].contiguous() for key, one in tensors.items()}
    )
    assert refused(other).startswith(f"{other}: does not fit its base: Error(s) in loading state_dict for ")
    assert ": size mismatch for base_model.model." in refused(other), "the line that says what"
    assert "\n" not in refused(other)


def test_an_adapter_over_a_resized_vocabulary_names_the_cure(run: Path, tmp_path: Path) -> None:
    """What other toolkits save where tokens were added; a3dff15 cut PEFT's text at a heading."""
    name = "base_model.model.model.embed_tokens.weight"
    wide = changed(run, tmp_path / "wide", lambda tensors: {**tensors, name: torch.ones(2112, 4)})
    assert refused(wide) == (
        f"{wide}: holds an embedding of 2,112 tokens, its base has 2,048: the vocabulary was resized; in PEFT, call "
        "resize_token_embeddings(2112) on the base, put the adapter on it, merge it (merge_and_unload), and give the "
        "merged folder"
    )


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_is_what_was_saved(run: Path, name: str) -> None:
    path = run / "adapter" / name
    saved, config = path.read_bytes(), name.endswith(".json")
    if config:  # where the base lies may change, what is made of the weights not
        path.write_text(json.dumps({**json.loads(saved), "peft_version": "9", "revision": None}, indent=1))
        place_of(run).check()
        path.write_bytes(saved.replace(b'"lora_alpha": 32.0', b'"lora_alpha": 33.0'))
    else:
        path.write_bytes(saved[:-5] + bytes([saved[-5] ^ 1]) + saved[-4:])
    assert path.read_bytes() != saved
    with pytest.raises(UserError) as raised:
        load_model(run)
    assert str(raised.value) == (
        f"{run / 'adapter'}: adapter_model.safetensors or adapter_config.json is not the file that was saved "
        "(gemma_ft.json); fetch both again"
    )


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"peft_type": "PROMPT_TUNING"},
            "a PROMPT_TUNING adapter is not supported: part of it is not in the layers but around the model, and "
            "cannot be merged either; train LoRA",
        ),
        (
            {"alora_invocation_tokens": [5]},
            "alora_invocation_tokens is set, which is not supported: PEFT switches it on by the prompt's tokens, "
            "around the model; train plain LoRA",
        ),
        (
            {"base_model_name_or_path": 5},
            "names no base model; pass the base as path and this as adapter",
        ),
    ],
)
def test_other_kinds_of_adapters_are_refused(run: Path, changes: dict[str, Any], why: str) -> None:
    """Their work is done by PEFT's wrapper around the model, which the engine does not go through."""
    path = run / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    if "peft_type" in changes:
        config = {key: config[key] for key in ("base_model_name_or_path", "task_type")} | {"num_virtual_tokens": 4}
    path.write_text(json.dumps({**config, **changes}))
    assert refused(run) == f"{path}: {why}"


def test_another_window_is_another_base(run: Path, small_gemma: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(small_gemma, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "sliding_window": 8}))
    assert refused(other, adapter=run / "adapter") == (
        f"{other}/config.json: has another window, scale, cap or shape than when {run / 'adapter'} was trained "
        "(gemma_ft.json); restore it"
    )
    (other / "config.json").write_text(json.dumps({**config, "sliding_window": 0}))
    assert refused(other) == (
        f"{other}/config.json: cannot be read as a Gemma's: sliding_window 0 is no number of tokens; Gemma 2 has 4096"
    )


def test_a_model_folder_holds_no_adapter_of_its_own(run: Path, small_gemma: Path, tmp_path: Path) -> None:
    """transformers would put it on unasked, below the adapter that was asked for."""
    both = tmp_path / "both"
    shutil.copytree(small_gemma, both)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(run / "adapter" / name, both / name)
    assert refused(both, adapter=run) == (
        f"{both}: an adapter lies in this model folder and would be put on unasked; move it to its own folder"
    )


def test_a_folder_whose_index_leaves_it_is_not_loaded(small_gemma: Path, tmp_path: Path) -> None:
    folder = tmp_path / "escape"
    shutil.copytree(small_gemma, folder)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    names = WeightFiles.open(small_gemma).names
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refused(folder) == (
        f"{folder}/model.safetensors.index.json: names '../outside.safetensors', which is not a file of this folder; "
        "do not trust this folder"
    )


def test_a_model_is_never_ignored_beside_an_adapter(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        place_of(tmp_path, run)
    assert str(caught.value) == (
        f"{tmp_path}: neither a model, an adapter nor a finished run; expected config.json or adapter/ in it"
    )
