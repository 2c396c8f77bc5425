"""Grafts: a tuned text model back under the original's own tower, every byte that was not tuned as it was."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_ft.build.contract import Contract, contract_of
from gemma_ft.build.located import Source
from gemma_ft.build.place import place_of
from gemma_ft.build.pretrained import load_base, load_model
from gemma_ft.build.text_weights import model_weights, others_fingerprint
from gemma_ft.build.weights import WeightFiles, save_tensors
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.tokenizer import load_tokenizer
from gemma_ft.errors import DiskError, UserError
from gemma_ft.export.export import ExportOptions, export_model
from gemma_ft.export.graft import OTHER_CHATS
from gemma_ft.export.merge.certified import merge_model
from gemma_ft.export.merge.merge import merge_to_folder
from tests.export.tuned import names_in, same_bytes, save_base, save_tuned
from tests.multimodal import image_inputs, index_of, reference, rewrite, save_multimodal
from tests.parity.amplified import relative

IDS = torch.randint(8, 300, (1, 40), generator=torch.Generator().manual_seed(0))
HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


class Folders(NamedTuple):
    """A multimodal base, an adapter on it, and the folder that holds both."""

    root: Path
    base: Path
    adapter: Path


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("made")
    base = save_multimodal(root / "base", dtype=request.param, shard="600KB")
    return Folders(root, base, tuned(root / "adapter", base))


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    base = save_multimodal(tmp_path / "base")
    return Folders(tmp_path, base, tuned(tmp_path / "adapter", base))


def tuned(folder: Path, base: Path, **settings: Any) -> Path:
    """An adapter with the contract of a run."""
    model = load_base(Source(str(base), None), dtype=torch.float32)
    save_tuned(folder, base, model, precision="float32", **settings)
    contract = Contract.read(folder)
    assert contract is not None
    replace(contract, others_sha256=others_fingerprint(base)).write(folder)
    return folder


def everything(folder: Path) -> dict[str, torch.Tensor]:
    files = WeightFiles.open(folder)
    return {name: files.tensor(name) for name in files.names}


def test_what_was_not_tuned_keeps_every_byte(made: Folders, tmp_path: Path) -> None:
    out = tmp_path / "graft"
    facts = merge_to_folder(place_of(made.adapter), out, graft=True)
    before, after, merged = everything(made.base), everything(out), place_of(made.adapter)
    assert index_of(out) == index_of(made.base)
    assert WeightFiles.open(out).shards == WeightFiles.open(made.base).shards
    changed = {name for name in before if not same_bytes(before[name], after[name])}
    assert changed == {f"language_model.{name}" for name in _linears(made.base)}
    assert facts.changed == len(changed) == (facts.graft or {})["replaced"]
    for file in WeightFiles.open(made.base).shards:  # headers too
        one, other = ((folder / file).read_bytes() for folder in (made.base, out))
        assert len(one) == len(other)
        length = 8 + int.from_bytes(one[:8], "little")
        assert one[:length] == other[:length]
    kept = set(names_in(made.base)) - set(WeightFiles.open(made.base).shards)
    assert {"config.json", "preprocessor_config.json", "generation_config.json", "chat_template.jinja"} < kept
    for name in kept:
        assert (out / name).read_bytes() == (made.base / name).read_bytes(), name
    assert merged.contract is not None
    assert Contract.read(out) is None  # the template of the adapter drops system texts, that of the base folds them


def _linears(base: Path) -> set[str]:
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return {name for name in model_weights(base).names if name.split(".")[-2] in names}


def test_stock_transformers_computes_the_merged_model_and_the_same_images(made: Folders, tmp_path: Path) -> None:
    merge_to_folder(place_of(made.adapter), tmp_path / "text")
    merge_to_folder(place_of(made.adapter), tmp_path / "graft", graft=True)
    whole, image = reference(tmp_path / "graft"), image_inputs(IDS)
    text = load_base(Source(str(tmp_path / "text"), None), dtype=torch.float32).eval()
    assert relative(whole(input_ids=IDS).logits, text(IDS).logits) < 1e-5
    again = load_model(tmp_path / "graft", dtype=torch.float32)  # as a base of ours
    assert torch.equal(again(IDS).logits, text(IDS).logits)
    before = reference(made.base)
    assert torch.equal(*(one.get_image_features(image["pixel_values"]).pooler_output for one in (before, whole)))
    assert not torch.allclose(before(**image).logits, whole(**image).logits)
    original, graft = model_weights(made.base), tmp_path / "graft"
    for file in WeightFiles.open(graft).shards:  # the text weights of the original put back by hand
        weights = load_file(graft / file)
        mine = {original.info(name).name: name for name in original.names}
        weights |= {name: original.tensor(mine[name]) for name in weights if name in mine}
        save_file(weights, graft / file, {"format": "pt"})
    assert torch.equal(reference(graft)(**image).logits, before(**image).logits)


def test_a_copy_of_the_head_follows_the_embedding(folders: Folders) -> None:
    rewrite(folders.base, lambda weights: {**weights, HEAD: weights[EMBEDDING].clone()})
    adapter = tuned(folders.root / "rows", folders.base, trainable_token_indices=[10, 11], ensure_weight_tying=True)
    merge_to_folder(place_of(adapter), folders.root / "graft", graft=True)
    after = everything(folders.root / "graft")
    assert torch.equal(after[HEAD], after[EMBEDDING])
    assert not torch.equal(after[HEAD], everything(folders.base)[HEAD])


def test_the_certificate_says_so(folders: Folders) -> None:
    out = folders.root / "graft"
    facts = merge_model(str(folders.adapter), out, graft=True, prompts=2)
    said = json.loads((out / "merge.json").read_text())
    assert said == facts.said()
    assert said["graft"] == {
        "name": str(folders.base),
        "revision": None,
        "model_type": "gemma3",
        "tensors": len(everything(folders.base)),
        "replaced": 49,
        "bytes": (folders.base / "model.safetensors").stat().st_size,
        "others_sha256": others_fingerprint(folders.base),
        "checked": "text and others",
    }
    assert said["certificate"]["passed"]
    assert "graft" not in merge_to_folder(place_of(folders.adapter), folders.root / "text").said()


def test_the_contract_goes_with_it_where_the_template_is_the_trained_one(folders: Folders) -> None:
    contract = Contract.read(folders.adapter)
    assert contract is not None
    same = contract_of(ChatEncoder(load_tokenizer(str(folders.base)), "fold"), base=str(folders.base))
    replace(same, base_sha256=contract.base_sha256, quantize="nf4").write(folders.adapter)
    merge_to_folder(place_of(folders.adapter), folders.root / "graft", graft=True)
    written = Contract.read(folders.root / "graft")
    assert written == replace(same, base_sha256=contract.base_sha256, quantize=None)


def test_a_model_tuned_as_a_whole_goes_back_too(folders: Folders) -> None:
    run = folders.root / "run" / "model"
    model = load_base(Source(str(folders.base), None), dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.01)
    model.to(torch.bfloat16).save_pretrained(run)
    contract = Contract.read(folders.adapter)
    assert contract is not None
    contract.write(run)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model"):
        shutil.copy(folders.adapter / file, run / file)
    options = ExportOptions(to="hf", out=folders.root / "graft", graft=True)
    export = export_model(str(folders.root / "run"), options)
    assert export.form.notes() == [OTHER_CHATS]
    before, after = everything(folders.base), everything(folders.root / "graft")
    text = {name for name in before if name.startswith("language_model.")}
    assert {name for name in before if not same_bytes(before[name], after[name])} == text
    assert {one.dtype for one in after.values()} == {torch.float32}
    assert relative(reference(folders.root / "graft")(input_ids=IDS).logits, model.float().eval()(IDS).logits) < 1e-5
    assert json.loads((folders.root / "graft" / "merge.json").read_text())["graft"]["name"] == "base"


def test_the_card_says_what_was_tuned(folders: Folders) -> None:
    options = ExportOptions(to="hf", out=folders.root / "graft", graft=True)
    export_model(str(folders.adapter), options)
    card = (folders.root / "graft" / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "tags:\n- gemma3\n- gemma-ft\n" in card, "as its config.json says"
    assert "Its text model was tuned; its vision tower and all other files are the base's, byte for byte." in card
    assert "As its own chat template writes them." in card
    assert str(folders.root) not in card + (folders.root / "graft" / "merge.json").read_text()


def refusal(folders: Folders, adapter: Path | None = None, **options: Any) -> str:
    with pytest.raises(UserError) as raised:
        merge_to_folder(place_of(adapter or folders.adapter), folders.root / "graft", graft=True, **options)
    assert not (folders.root / "graft").exists()
    assert not list(folders.root.glob(".*staging"))
    return str(raised.value).replace(str(folders.root), "ROOT")


def test_a_dtype_is_refused(folders: Folders) -> None:
    assert refusal(folders, dtype=torch.bfloat16) == (
        "--dtype: --graft keeps the dtypes of the original; leave one of them out"
    )


def test_a_text_model_alone_is_refused(folders: Folders) -> None:
    base = save_base(folders.root / "plain", "gemma-2-9b")
    adapter = save_tuned(folders.root / "on_plain", base, load_base(Source(str(base), None), dtype=torch.float32))
    assert refusal(folders, adapter) == (
        "--graft: ROOT/plain holds a text model alone, with nothing beside it to be put back to; leave --graft out"
    )


def test_another_tower_is_refused(folders: Folders) -> None:
    known = str(others_fingerprint(folders.base))
    rewrite(folders.base, lambda weights: {**weights, "multi_modal_projector.mm_soft_emb_norm.weight": torch.ones(32)})
    found = str(others_fingerprint(folders.base))
    assert refusal(folders) == (
        f"--graft: the vision tower of ROOT/base has fingerprint {found[:12]}, that of the run's base {known[:12]} "
        "(gemma_ft.json); restore the base that it was trained on"
    )


def test_another_text_model_is_refused(folders: Folders) -> None:
    rewrite(folders.base, lambda weights: {**weights, "language_model.model.norm.weight": torch.ones(80)})
    assert refusal(folders).startswith("ROOT/adapter: was trained on ROOT/base with fingerprint ")
    shutil.rmtree(folders.root / "adapter")


def test_a_model_without_an_original_is_refused(folders: Folders) -> None:
    options = ExportOptions(to="hf", out=folders.root / "graft", graft=True)
    with pytest.raises(UserError) as raised:
        export_model(str(folders.base), options)
    assert str(raised.value) == (
        f"--graft: {folders.base} does not say what it was tuned from (gemma_ft.json); name a run"
    )


def test_a_grown_vocabulary_is_refused(folders: Folders) -> None:
    model = load_base(Source(str(folders.base), None), dtype=torch.float32)
    known, width = model.model.embed_tokens.weight.shape
    adapter = tuned(folders.root / "grown", folders.base, target_modules=["q_proj"])
    file = adapter / "adapter_model.safetensors"
    rows = torch.randn(2, width)
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_"
    save_tensors(file, {**load_file(file), f"{name}delta": rows, f"{name}original": rows.clone()})
    fields = json.loads((adapter / "adapter_config.json").read_text())
    fields["trainable_token_indices"] = {"embed_tokens": [known, known + 1]}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    assert refusal(folders, adapter) == (
        f"--graft: the vocabulary grew from {known:,} to {known + 2:,} tokens, for which the original's config.json "
        "has no room; leave --graft out"
    )


def test_too_little_disk_is_told_first_with_all_that_is_written(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(folders.root)._replace(free=64 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskError) as raised:
        merge_to_folder(place_of(folders.adapter), folders.root / "graft", graft=True)
    whole = 64 * 2**20 + (folders.base / "model.safetensors").stat().st_size
    assert f"needs {whole / 1e9:.3g} GB, its disk has" in str(raised.value)


def test_a_byte_that_did_not_come_back_is_told(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    real = WeightFiles.tensor

    def flipped(files: WeightFiles, name: str) -> torch.Tensor:
        found = real(files, name)
        return found + 1 if "staging" in str(files.folder) and name.startswith("vision_tower.post") else found

    monkeypatch.setattr(WeightFiles, "tensor", flipped)
    assert refusal(folders) == (
        "vision_tower.post_layernorm.bias did not come back from the disk as it was written; check the disk and run "
        "again"
    )


@pytest.mark.parametrize("form", ["gguf", "adapter"])
def test_other_forms_are_refused(form: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        ExportOptions(to=form, out=tmp_path / "out", graft=True).check()
    assert str(raised.value) == f"--graft: goes with --to hf, not with --to {form}"


def test_a_text_only_merge_loads_in_stock_transformers(made: Folders, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    merge_to_folder(place_of(made.adapter), tmp_path / "text")
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
    assert config["eos_token_id"] == [1, 7]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "text", dtype=torch.float32).eval()
    live = load_model(made.adapter, dtype=torch.float32)
    bound = 1e-5 if model_weights(made.base).info("model.norm.weight").dtype == torch.float32 else 0.05
    assert relative(model(IDS).logits, live(input_ids=IDS).logits) < bound
