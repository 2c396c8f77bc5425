"""Every fault is one clear line, and nothing is left behind: not the folder, not a staging folder, not a file in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_ft.build.located import Source
from gemma_ft.build.place import place_of
from gemma_ft.build.pretrained import load_base
from gemma_ft.build.weights import WeightFiles
from gemma_ft.errors import UserError
from gemma_ft.export.merge.merge import merge_to_folder
from gemma_ft.recipe.run_files import RunFiles
from tests.export.conftest import Folders
from tests.export.tuned import names_in, save_tuned

SHARD, INDEX = "model-00002-of-00005.safetensors", "model.safetensors.index.json"
Q0 = "model.layers.0.self_attn.q_proj.weight"


def refused(folders: Folders, kind: type[UserError] = UserError, **options: Any) -> str:
    """The one line of a merge that must fail, with the folders' names cut short; nothing is left behind."""
    before = {path: path.stat().st_mtime_ns for path in folders.root.rglob("*")}
    with pytest.raises(UserError) as caught:
        merge_to_folder(place_of(folders.adapter), folders.root / "out", **options)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in folders.root.rglob("*")} == before
    return str(caught.value).replace(str(folders.root), "ROOT")


def test_another_base_is_refused(folders: Folders) -> None:
    trained_on = WeightFiles.open(folders.base).fingerprint()
    edit(folders.base / SHARD, lambda weights: next(iter(weights.values())).mul_(1.01))
    found = WeightFiles.open(folders.base).fingerprint()
    assert refused(folders) == (
        f"ROOT/adapter: was trained on ROOT/base with fingerprint {trained_on[:12]}, but ROOT/base has {found[:12]} "
        "(gemma_ft.json); give the base that it was trained on"
    )


def test_another_base_without_a_contract_is_refused_by_its_shapes(folders: Folders, first_base: Path) -> None:
    (folders.adapter / "gemma_ft.json").unlink()
    with pytest.raises(UserError) as caught:
        merge_to_folder(place_of(first_base, folders.adapter), folders.root / "out")
    assert str(caught.value) == (
        f"{folders.adapter}: base_model.model.model.layers.0.mlp.down_proj.lora_B.weight is [288, 4], {first_base} "
        "asks for [128, 4]; wrong base, or a config that is not this adapter's"
    )
    assert names_in(folders.root) == ["adapter", "base"]


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_a_tensor_that_is_missing_everywhere(folders: Folders) -> None:
    """Neither a file nor the index knows of it."""
    whole = folders.base / "model.safetensors"
    weights = {name: tensor for path in folders.base.glob("*.safetensors") for name, tensor in load_file(path).items()}
    del weights[Q0]
    for path in (*folders.base.glob("model-*"), folders.base / INDEX):
        path.unlink()
    save_file(weights, whole, metadata={"format": "pt"})
    (folders.adapter / "gemma_ft.json").unlink()
    assert refused(folders) == f"ROOT/base: missing in the weights: {Q0}"


def test_a_tensor_that_only_the_index_has(folders: Folders) -> None:
    file = json.loads((folders.base / INDEX).read_text())["weight_map"][Q0]
    edit(folders.base / file, lambda weights: weights.pop(Q0))
    assert refused(folders) == f"ROOT/base/{file}: has no tensor {Q0}, though {INDEX} says so"


def test_a_shard_that_is_missing(folders: Folders) -> None:
    (folders.base / SHARD).unlink()
    assert refused(folders) == f"ROOT/base/{SHARD}: missing, though {INDEX} names it; fetch the folder again"


@pytest.mark.parametrize("name", [f"base/{SHARD}", "adapter/adapter_model.safetensors"])
@pytest.mark.parametrize("kept", [0, 5, 0.5])
def test_a_file_that_was_cut_short(name: str, kept: float, folders: Folders) -> None:
    path = folders.root / name
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if kept < 1 else int(kept)])
    line = refused(folders)
    assert line.startswith(f"ROOT/{name}: damaged or cut short (")
    assert line.endswith("); fetch it again")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pkl"])
def test_a_pickle_is_never_opened(name: str, folders: Folders) -> None:
    for path in (*folders.base.glob("model-*"), folders.base / INDEX):
        path.unlink()
    (folders.base / name).write_bytes(b"cos\nsystem\n(S'exit 3'\ntR.")
    assert refused(folders) == (
        f"ROOT/base/{name}: a pickle can run code when it is opened and is refused; "
        "convert it to safetensors where it was made"
    )


@pytest.mark.parametrize("file", ["../base/model.safetensors", "/etc/model.safetensors", "..", "x/y.safetensors"])
def test_an_index_cannot_leave_its_folder(file: str, folders: Folders) -> None:
    index = json.loads((folders.base / INDEX).read_text())
    index["weight_map"][Q0] = file
    (folders.base / INDEX).write_text(json.dumps(index))
    assert refused(folders) == (
        f"ROOT/base/{INDEX}: names {file!r}, which is not a file of this folder; do not trust this folder"
    )


def test_an_adapter_with_nan(folders: Folders) -> None:
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    edit(folders.adapter / "adapter_model.safetensors", lambda weights: weights[name][0].fill_(torch.nan))
    assert refused(folders) == f"ROOT/adapter: {name} holds NaN or infinite values; take an earlier checkpoint"


def test_an_adapter_that_overflows_the_merge(folders: Folders) -> None:
    def blow_up(weights: dict[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            if "layers.0.self_attn.q_proj" in name:
                weight.fill_(1e30)

    edit(folders.adapter / "adapter_model.safetensors", blow_up)
    assert refused(folders) == f"{Q0}: not finite after the merge in torch.bfloat16; the adapter or the base is damaged"


def test_an_adapter_that_was_never_trained(folders: Folders) -> None:
    def zero(weights: dict[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            weight.mul_("lora_B" not in name)

    edit(folders.adapter / "adapter_model.safetensors", zero)
    assert refused(folders) == (
        "ROOT/adapter: every lora_B is zero, so it was never trained; there is nothing to merge"
    )


def test_a_tensor_of_no_weight(folders: Folders) -> None:
    def move(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if "layers.1.mlp.up_proj" in name]:
            weights[name.replace("layers.1", "layers.7")] = weights.pop(name)

    edit(folders.adapter / "adapter_model.safetensors", move)
    assert refused(folders) == (
        "ROOT/adapter: base_model.model.model.layers.7.mlp.up_proj.lora_B.weight belongs to no weight of ROOT/base; "
        "wrong base?"
    )


def test_a_head_that_is_not_the_embedding(folders: Folders) -> None:
    edit(folders.base / SHARD, lambda weights: weights.update({"lm_head.weight": torch.ones(2048, 288)}))
    index = json.loads((folders.base / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = SHARD
    (folders.base / INDEX).write_text(json.dumps(index))
    (folders.adapter / "gemma_ft.json").unlink()
    assert refused(folders) == "ROOT/base: lm_head.weight is not the embedding, as in every Gemma; this is no Gemma"


def test_a_base_in_float16_needs_a_dtype(folders: Folders) -> None:
    for path in folders.base.glob("*.safetensors"):
        save_file({name: one.half() for name, one in load_file(path).items()}, path, metadata={"format": "pt"})
    (folders.adapter / "gemma_ft.json").unlink()
    assert refused(folders) == ("ROOT/base: stored as float16, in which Gemma overflows; give --dtype bf16 or f32")
    merge_to_folder(place_of(folders.adapter), folders.root / "out", dtype=torch.bfloat16)


@pytest.mark.parametrize(("name", "wrong"), [("mlp.up_proj", "model_type"), ("x", "no json")])
def test_a_config_that_is_no_gemma(name: str, wrong: str, folders: Folders) -> None:
    path = folders.base / "config.json"
    if wrong == "no json":
        path.write_text("{")
        assert refused(folders).startswith("ROOT/base/config.json: cannot be read as a Gemma's: ")
        return
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "llama"}))
    assert refused(folders) == (
        "ROOT/base/config.json: cannot be read as a Gemma's: model_type 'llama' is not Gemma 1, 2, 3 or VaultGemma; "
        "supported: gemma, gemma2, gemma3_text, vaultgemma, gemma3"
    )


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads 0 is no number of heads; fetch the file again"),
        (
            {"num_attention_heads": None},
            "Validation error for field 'num_attention_heads': TypeError: Field 'num_attention_heads' expected int, "
            "got NoneType (value: None)",
        ),
    ],
    ids=str,
)
def test_a_config_that_transformers_refuses_is_one_line(
    hashed: bool, fields: dict[str, Any], why: str, folders: Folders
) -> None:
    """Where the contract knows a hash of the config it is read first to compare that, else to merge."""
    path, contract = folders.base / "config.json", folders.adapter / "gemma_ft.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    if hashed:
        contract.write_text(json.dumps({**json.loads(contract.read_text()), "numerics_sha256": "of another"}))
    assert refused(folders) == f"ROOT/base/config.json: cannot be read as a Gemma's: {why}"


def test_weights_that_are_quantized_already(folders: Folders) -> None:
    path = folders.base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"load_in_4bit": True}}))
    assert refused(folders) == (
        "ROOT/base/config.json: these weights are quantized already; name the base that they were made from"
    )


def test_another_template_than_the_trained_one(folders: Folders) -> None:
    (folders.adapter / "chat_template.jinja").write_text("{{ messages }}")
    assert refused(folders).startswith("ROOT/adapter: its chat template is not the one that was trained")


def test_dequantized_without_quantization(folders: Folders) -> None:
    (folders.adapter / "gemma_ft.json").unlink()
    assert refused(folders, policy="dequantized") == (
        "--base dequantized: the adapter was not trained over a quantized base; leave it out"
    )


def test_adapters_that_do_not_add_up(folders: Folders, base_bf16: Path) -> None:
    model = load_base(Source(str(base_bf16), None), dtype=torch.float32)
    dora = save_tuned(folders.root / "dora", folders.base, model, quantize="nf4", use_dora=True)
    both = [(folders.adapter, 1.0), (dora, 1.0)]
    line = "ROOT/dora: a DoRA adapter cannot be weighted or combined; merge it alone, weight 1"
    assert refused(folders, adapters=both) == line
    assert refused(folders, adapters=[(dora, 0.5)]) == line
    model = load_base(Source(str(base_bf16), None), dtype=torch.float32)
    int8 = save_tuned(folders.root / "int8", folders.base, model, quantize="int8")
    assert refused(folders, adapters=[(folders.adapter, 1.0), (int8, 1.0)]) == (
        "ROOT/int8: quantize 'int8' in its contract, ROOT/adapter has 'nf4'; adapters that are merged together must "
        "have been trained alike"
    )
    assert refused(folders, adapters=[(folders.base, 1.0)]) == (
        "ROOT/base: no adapter_config.json in it; name a run or a PEFT adapter folder"
    )


def test_a_whole_model_has_nothing_to_merge(folders: Folders) -> None:
    with pytest.raises(UserError) as caught:
        merge_to_folder(place_of(folders.base), folders.root / "out")
    assert str(caught.value) == (
        f"{folders.base}: is a whole model, with nothing to merge; gemma-ft export MODEL --to hf --out DIR copies it, "
        "--adapter DIR names an adapter for it"
    )


RUN_FOLDERS = [path.name for path in RunFiles(Path("run")).folders]
