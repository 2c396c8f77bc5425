"""The text model of a multimodal folder: found under every prefix, whole or refused, and nothing else ever read."""

from __future__ import annotations

import builtins
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_ft.build import weights as weights_module
from gemma_ft.build.empty_weights import empty_base
from gemma_ft.build.located import Source
from gemma_ft.build.place import BaseFiles
from gemma_ft.build.pretrained import load_base, load_model
from gemma_ft.build.text_weights import model_weights, others_fingerprint, others_told
from gemma_ft.build.weights import WeightFiles
from gemma_ft.errors import UserError
from gemma_ft.families.records import PRESETS
from gemma_ft.model.gemma import GemmaForCausalLM
from tests.multimodal import index_of, reference, rewrite, save_multimodal
from tests.parity.amplified import amplify, relative

Weights = dict[str, Tensor]
IDS = torch.randint(8, 300, (2, 40), generator=torch.Generator().manual_seed(0))
TEXT = "language_model.model."
HEAD, EMBEDDING = "language_model.lm_head.weight", f"{TEXT}embed_tokens.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one file."""
    return save_multimodal(tmp_path_factory.mktemp("whole") / "base")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(whole, tmp_path / "base"))


def loaded(folder: Path, **options: Any) -> Any:
    return load_base(Source(str(folder), None), dtype=torch.float32, **options).eval()


def prefixed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {
        prefix + name.removeprefix(TEXT) if name.startswith(TEXT) else name: one for name, one in weights.items()
    }


def text_alone(folder: Path) -> None:
    """Leave the text model alone in the folder, with its own config."""
    config = json.loads((folder / "config.json").read_text())["text_config"]
    (folder / "config.json").write_text(json.dumps(config))
    rewrite(folder, lambda weights: {name: one for name, one in weights.items() if name.startswith(TEXT)})


def test_the_text_model_is_transformers_own(whole: Path) -> None:
    expected = reference(whole)(input_ids=IDS).logits
    assert relative(loaded(whole)(IDS).logits, expected) < 1e-5
    assert loaded(whole).generation_config.eos_token_id == [1, 7]


@pytest.mark.parametrize(
    "prefix", ["model.language_model.", "model.language_model.model.", "language_model.", "model.", ""]
)
@pytest.mark.parametrize("alone", [False, True])
def test_a_prefix_changes_nothing(prefix: str, alone: bool, whole: Path, folder: Path) -> None:
    """Neither logits, nor names, nor what a run knows its base by."""
    if alone:
        text_alone(folder)
    rewrite(folder, prefixed(prefix))
    assert torch.equal(loaded(folder)(IDS).logits, loaded(whole)(IDS).logits)
    assert BaseFiles(Source(str(folder), None)).sha256 == BaseFiles(Source(str(whole), None)).sha256
    assert model_weights(folder).names == model_weights(whole).names
    assert set(model_weights(folder).names) == set(empty_base(Source(str(folder), None), dtype=torch.float32).state_dict()) - {"lm_head.weight"}  # fmt: skip # noqa: E501
    for name in model_weights(whole).names:
        assert torch.equal(model_weights(folder).tensor(name), model_weights(whole).tensor(name))


@pytest.mark.parametrize("head", [HEAD, "lm_head.weight"])
def test_an_equal_copy_of_the_head_loads(head: str, whole: Path, folder: Path) -> None:
    rewrite(folder, lambda weights: {**weights, head: weights[EMBEDDING].clone()})
    assert torch.equal(loaded(folder)(IDS).logits, loaded(whole)(IDS).logits)


def without(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: one for key, one in weights.items() if key != name}


def having(**more: Tensor) -> Callable[[Weights], Weights]:
    return lambda weights: {**weights, **{key.replace("__", "."): one for key, one in more.items()}}


BROKEN: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "missing": (
        without(f"{TEXT}layers.3.self_attn.q_norm.weight"),
        "missing keys in the weights: model.layers.3.self_attn.q_norm.weight",
    ),
    "unknown": (
        having(language_model__model__layers__0__mlp__router__weight=torch.zeros(2)),
        "unexpected keys in the weights: model.layers.0.mlp.router.weight",
    ),
    "of no model": (having(audio_tower__weight=torch.zeros(2)), "unexpected keys in the weights: audio_tower.weight"),
    "another shape": (
        having(language_model__model__norm__weight=torch.zeros(3)),
        "mismatched keys in the weights: model.norm.weight is [3], config.json asks for [80]",
    ),
    "doubled": (
        having(model__language_model__norm__weight=torch.zeros(80)),
        "language_model.model.norm.weight and model.language_model.norm.weight are one tensor of the model, twice; "
        "fetch it again",
    ),
    "another head": (
        lambda weights: {**weights, HEAD: weights[EMBEDDING] * 2},
        "lm_head.weight is not the embedding; every Gemma's head is tied to it: "
        "drop lm_head.weight from the weights and tie_word_embeddings from config.json",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_refused_before_any_tensor_is_read(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = BROKEN[case]
    rewrite(folder, change)
    monkeypatch.setattr(WeightFiles, "tensor", lambda *_: pytest.fail("a tensor was read"))
    monkeypatch.setattr(
        "gemma_ft.model.gemma.GemmaForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("it was loaded")
    )
    for build in (lambda: loaded(folder), lambda: empty_base(Source(str(folder), None), dtype=torch.float32)):
        with pytest.raises(UserError) as raised:
            build()
        assert str(raised.value) == f"{folder}: {message}"


UNFITTING: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "missing": (without("model.norm.weight"), "missing keys in the weights: model.norm.weight"),
    "unknown": (having(model__router__weight=torch.zeros(2)), "unexpected keys in the weights: model.router.weight"),
    "another shape": (
        having(model__norm__weight=torch.zeros(3)),
        "mismatched keys in the weights: model.norm.weight is [3], config.json asks for [64]",
    ),
    "another head": (
        lambda weights: {**weights, "lm_head.weight": weights["model.embed_tokens.weight"] * 2},
        BROKEN["another head"][1],
    ),
}


@pytest.mark.parametrize("case", UNFITTING)
def test_of_a_text_model_alone_slices_are_refused_in_the_loader_s_words(case: str, tmp_path: Path) -> None:
    """A Gemma 2, whose files have no other names, loaded whole by transformers or to be cut over ranks."""
    change, message = UNFITTING[case]
    model = GemmaForCausalLM(PRESETS["gemma-tiny"].config(vocab_size=101, hidden_size=64, num_hidden_layers=2))
    amplify(model)
    model.save_pretrained(str(tmp_path))
    empty_base(Source(str(tmp_path), None), dtype=torch.float32)
    rewrite(tmp_path, change)
    for build in (lambda: loaded(tmp_path), lambda: empty_base(Source(str(tmp_path), None), dtype=torch.float32)):
        with pytest.raises(UserError) as raised:
            build()
        assert str(raised.value) == f"{tmp_path}: {message}"


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_headers_are_read_once(quantize: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    header = weights_module._header
    monkeypatch.setattr(weights_module, "_header", lambda path: read.append(path) or header(path))
    loaded(folder, quantize=quantize)
    empty_base(Source(str(folder), None), dtype=torch.bfloat16, quantize=quantize)
    assert read == [folder / "model.safetensors"] * 2


def test_another_prefix_beside_it_is_no_second_model(folder: Path) -> None:
    rewrite(folder, lambda weights: {**weights, f"model.{EMBEDDING}": weights[EMBEDDING].clone()})
    with pytest.raises(UserError, match="are one tensor of the model, twice"):
        load_model(folder)


def apart(folder: Path) -> Path:
    """Put what is no text into a shard of its own; returns that file."""
    weights = load_file(folder / "model.safetensors")
    shards = {"text.safetensors": TEXT, "tower.safetensors": ("vision_tower", "multi_modal")}
    places = {}
    for file, start in shards.items():
        held = {name: one for name, one in weights.items() if name.startswith(start)}
        save_file(held, folder / file, {"format": "pt"})
        places.update(dict.fromkeys(held, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "model.safetensors").unlink()
    return folder / "tower.safetensors"


def test_a_tower_that_is_damaged_or_absent_is_not_missed(whole: Path, folder: Path) -> None:
    tower, expected = apart(folder), loaded(whole)(IDS).logits
    known = others_fingerprint(folder)
    assert known == others_fingerprint(whole)
    assert known is not None
    size = tower.stat().st_size
    assert others_told(model_weights(folder)) == (
        f"multi_modal_projector, vision_tower: {size / 1e3:.1f} kB stay in the folder, not loaded"
    )
    tower.write_bytes(b"no safetensors")
    assert torch.equal(loaded(folder)(IDS).logits, expected)
    assert others_fingerprint(folder) is None
    tower.unlink()
    assert torch.equal(loaded(folder)(IDS).logits, expected)
    assert others_told(model_weights(folder)) == (
        "multi_modal_projector, vision_tower: not all of it is in the folder, and none of it is needed"
    )
    with pytest.raises(UserError, match=r"missing, though model\.safetensors\.index\.json names it"):
        WeightFiles.open(folder)


def test_a_tower_in_a_shard_of_its_own_is_never_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = apart(folder)
    seen: list[str] = []
    real = builtins.open

    def noted(file: Any, *more: Any, **options: Any) -> Any:
        seen.append(os.fsdecode(file) if isinstance(file, str | bytes | os.PathLike) else "")
        return real(file, *more, **options)

    monkeypatch.setattr(builtins, "open", noted)
    monkeypatch.setattr(io, "open", noted)
    tower.chmod(0)  # whoever opens it below Python fails, unless he is root
    model = loaded(folder, quantize="nf4")
    assert not [name for name in seen if name.endswith("tower.safetensors")]
    assert sum(weight.numel() for weight in model.parameters()) > 0


def test_the_others_of_a_folder_are_told_apart(whole: Path, folder: Path) -> None:
    rewrite(folder, lambda weights: {**weights, "multi_modal_projector.mm_soft_emb_norm.weight": torch.ones(32)})
    assert others_fingerprint(folder) != others_fingerprint(whole)
    assert model_weights(folder).fingerprint() == model_weights(whole).fingerprint()
    text_alone(folder)
    assert others_fingerprint(folder) is None
    assert others_told(model_weights(folder)) is None


def test_shards_name_the_tensors_of_both(tmp_path: Path) -> None:
    folder = save_multimodal(tmp_path / "base", shard="600KB")
    names = index_of(folder)
    assert len(set(names.values())) > 1
    files = model_weights(folder)
    assert {files.info(name).name for name in files.names} | set(files.left) == set(names)
    assert all(files.info(name).file.name == names[files.info(name).name] for name in files.names)
