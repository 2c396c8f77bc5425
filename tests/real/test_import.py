"""`gemma-ft import` of Google's own Gemma 3 270M, and of files of the other published vocabularies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gemma_ft.build.weights import WeightFiles
from gemma_ft.data.encode.tokenizer import ContentEncoder, load_tokenizer
from gemma_ft.export.export import ExportOptions, export_model
from gemma_ft.export.gguf_import.import_gguf import import_gguf
from gemma_ft.export.gguf_reader import read_gguf
from gemma_ft.families.records import PRESETS
from tests.real.corpus import has_sign_run, lines

gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
NOT_IN_THE_FILE = "<image_soft_token>"  # 262144, for which the embedding has no row


def specs(*folders: Path) -> list[dict[str, object]]:
    return [json.loads(load_tokenizer(str(one)).backend_tokenizer.to_str()) for one in folders]


def check_ids(published: Path, imported: Path, texts: list[str]) -> None:
    """Ids of texts, as transformers and as training have them: no text differs."""
    tokenizers = [load_tokenizer(str(one)) for one in (published, imported)]
    ids = [ContentEncoder(one).encode_many(texts) for one in tokenizers]
    assert [text for text, *two in zip(texts, *ids, strict=True) if two[0] != two[1]] == []
    plain = [text for text in texts if NOT_IN_THE_FILE not in text]
    ids = [one(plain).input_ids for one in tokenizers]
    assert [text for text, *two in zip(plain, *ids, strict=True) if two[0] != two[1]] == []
    assert {one[0] for one in ids[1]} == {tokenizers[1].bos_token_id}


def test_the_tokenizer_of_the_270m_is_the_published_one(gemma3_270m: Path, gemma3_tokenizer: Path) -> None:
    """All 262,144 pieces, all 514,906 merges in their order, and ids of every text."""
    published, imported = specs(gemma3_tokenizer, gemma3_270m)
    assert published["model"] == imported["model"]
    added = [{token["id"]: token["content"] for token in spec["added_tokens"]} for spec in (published, imported)]  # type: ignore[attr-defined]
    assert len(added[0]) == 6415
    assert {id: name for id, name in added[0].items() if name != NOT_IN_THE_FILE} == added[1]
    for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        assert published[key] == imported[key], key
    check_ids(gemma3_tokenizer, gemma3_270m, lines())
    assert {105, 106} <= ContentEncoder(load_tokenizer(str(gemma3_270m))).control_ids  # no question can forge a turn


@pytest.mark.parametrize("family", ["gemma1", "gemma2"])
def test_a_file_of_ours_brings_its_tokenizer_back(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Also from the first conversion of Gemma 1's, which ranks merges by the id of the piece; of a run with a typed
    U+2581 in it the import makes what Gemma 2's published tokenizer does.
    """
    model: Path = request.getfixturevalue(family)
    export_model(str(model), ExportOptions(to="gguf", out=tmp_path / "x.gguf"))
    import_gguf(tmp_path / "x.gguf", tmp_path / "out", config=model / "config.json")
    texts = [text for text in lines() if family == "gemma2" or not has_sign_run(text)]
    check_ids(model, tmp_path / "out", texts)
    if family == "gemma2":
        before, after = specs(model, tmp_path / "out")
        assert before["model"] == after["model"]
        published = ContentEncoder(load_tokenizer(str(model)))
        assert ContentEncoder(load_tokenizer(str(tmp_path / "out"))).sha256 == published.sha256


def test_every_number_of_the_270m_is_the_file_s(gemma3_270m: Path, gemma3_270m_gguf: Path) -> None:
    """Bit for bit what the package gguf makes of it; norms without the 1."""
    files = WeightFiles.open(gemma3_270m)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, 18)
    file = read_gguf(gemma3_270m_gguf)  # the package's own takes a minute for the lists of tokens
    assert len(files.names) == len(file.tensors) == 236
    for name in files.names:
        one = file.tensors[names.get_name(name, try_suffixes=(".weight",))]
        raw = file.data[one.start : one.start + one.bytes].reshape(*one.shape[:-1], -1)
        expected = gguf.dequantize(raw, gguf.GGMLQuantizationType[one.type])
        expected = expected - np.float32(1) if name.endswith("norm.weight") else expected
        assert torch.equal(files.tensor(name), torch.from_numpy(np.array(expected))), name


def test_the_folder_says_what_it_is(gemma3_270m: Path) -> None:
    config = json.loads((gemma3_270m / "config.json").read_text())
    assert {key: config[key] for key in PRESETS["gemma-3-270m"].fields} == PRESETS["gemma-3-270m"].fields
    assert (config["rms_norm_eps"], config["dtype"]) == (1e-6, "float32")
    assert json.loads((gemma3_270m / "generation_config.json").read_text())["eos_token_id"] == [1]
    assert not (gemma3_270m / "chat_template.jinja").exists()
    note = (gemma3_270m / "README.md").read_text()
    for words in (
        "license: gemma",
        "sha256 `a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818`",
        "does not answer in turns",
        "https://ai.google.dev/gemma/terms",
    ):
        assert words in note
