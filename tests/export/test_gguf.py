"""A GGUF file: every weight as the folder has it, every number and token that llama.cpp needs, and what is refused."""

from __future__ import annotations

import json
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_ft.build.contract import Contract, contract_of
from gemma_ft.build.place import place_of
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.tokenizer import add_tokens, load_tokenizer
from gemma_ft.errors import UserError
from gemma_ft.export import gguf_file
from gemma_ft.export.form_names import GgufType
from gemma_ft.export.gguf_check import check_for_llama_cpp
from gemma_ft.export.gguf_file import plan_gguf, verify_gguf, write_gguf
from gemma_ft.export.gguf_pieces import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from gemma_ft.export.gguf_reader import gguf_library
from gemma_ft.export.gguf_tokenizer import read_vocabulary
from gemma_ft.export.merge.merged import MergedWeights
from gemma_ft.families.chat_template import TURNS
from gemma_ft.families.records import FAMILIES, PRESETS
from tests.export.gguf_files import stored, values, write
from tests.export.tuned import TINY, save_base

gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
# Largest error of a stored weight: of its own size (a float of so many bits), or of the largest in its block of 32,
# whose scale is rounded to float16 besides.
HALF_STEP = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8, "q8_0": 0.5 / 127 + 2.0**-11}
SMALLEST = {"f32": 0.0, "f16": 2.0**-25, "bf16": 0.0, "q8_0": 0.0}  # half a step below float16's normal numbers
SHAPES = {"gemma": "gemma-2b", "gemma2": "gemma-2-9b"}  # widths that are multiples of 32


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("gguf")
    return {family: save_base(root / family, shape) for family, shape in SHAPES.items()}


@pytest.mark.parametrize("kind", get_args(GgufType))
@pytest.mark.parametrize("family", SHAPES)
def test_every_weight_comes_back(family: str, kind: GgufType, folders: dict[str, Path], tmp_path: Path) -> None:
    reader = write(folders[family], tmp_path / "x.gguf", kind)
    weights = load_file(folders[family] / "model.safetensors")
    arch = {"gemma": gguf.MODEL_ARCH.GEMMA, "gemma2": gguf.MODEL_ARCH.GEMMA2}[family]
    names = gguf.get_tensor_name_map(arch, 2)
    assert len(reader.tensors) == len(weights)
    for name, weight in weights.items():
        found = stored(reader, names.get_name(name, try_suffixes=(".weight",)))
        expected = weight.numpy()
        if "norm" in name:
            assert (found == expected + np.float32(1)).all(), name
            continue
        size = np.abs(expected)
        if kind == "q8_0":
            size = np.repeat(size.reshape(-1, 32).max(axis=1), 32).reshape(size.shape)
        assert (np.abs(found - expected) <= HALF_STEP[kind] * size + SMALLEST[kind]).all(), name
        assert kind == "f32" or (found != expected).any(), name


def test_all_that_llama_cpp_reads_of_a_gemma_2(folders: dict[str, Path], tmp_path: Path) -> None:
    found = values(write(folders["gemma2"], tmp_path / "x.gguf", "q8_0", license=("gemma", "link")))
    tokenizer = {key: value for key, value in found.items() if key.startswith("tokenizer.")}
    assert {key: value for key, value in found.items() if key not in tokenizer} == {
        "general.architecture": "gemma2",
        "general.type": "model",
        "general.name": "x",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "general.license": "gemma",
        "general.license.link": "link",
        "gemma2.context_length": 256,
        "gemma2.embedding_length": 224,
        "gemma2.block_count": 2,
        "gemma2.feed_forward_length": 96,
        "gemma2.attention.head_count": 16,
        "gemma2.attention.head_count_kv": 8,
        "gemma2.attention.key_length": 16,
        "gemma2.attention.value_length": 16,
        "gemma2.rope.dimension_count": 16,
        "gemma2.rope.freq_base": 10000.0,
        "gemma2.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "gemma2.vocab_size": 2048,
        "gemma2.attn_logit_softcapping": 50.0,
        "gemma2.final_logit_softcapping": 30.0,
        "gemma2.attention.sliding_window": 8,
    }
    lists = ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type")
    assert [len(tokenizer.pop(name)) for name in lists] == [2048, 2048, 2048]
    assert tokenizer == {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 6,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": TURNS.text("fold", marked=False),
    }


def test_a_gemma_1_has_neither_caps_nor_window(folders: dict[str, Path], tmp_path: Path) -> None:
    found = values(write(folders["gemma"], tmp_path / "x.gguf"))
    assert found["general.architecture"] == "gemma"
    assert found["gemma.attention.head_count_kv"] == 1
    assert not [name for name in found if "softcap" in name or "window" in name]


def test_the_contract_travels_in_the_file(tmp_path: Path) -> None:
    contract = contract_of(ChatEncoder(load_tokenizer(TINY), "drop"), base="gemma-tiny")
    found = values(write(Path(TINY), tmp_path / "x.gguf", contract=contract))
    assert Contract(**json.loads(found["gemma_ft.contract"])) == contract


def test_scores_and_kinds_are_those_of_sentencepiece() -> None:
    found = read_vocabulary(load_tokenizer(TINY), rows=2050)
    kinds = {0: CONTROL, 1: CONTROL, 2: CONTROL, 3: UNKNOWN, 4: CONTROL, 5: CONTROL, 6: CONTROL, 7: USER_DEFINED,
             15: NORMAL, 22: USER_DEFINED, 48: BYTE, 57: BYTE, 1000: NORMAL, 2048: UNUSED, 2049: UNUSED}  # fmt: skip
    assert {id: found.kinds[id] for id in kinds} == kinds
    texts = {4: "<mask>", 6: "<end_of_turn>", 7: "\n", 15: "▁▁", 22: "<table>", 48: "<0x00>", 57: "<0x09>",
             1000: "▁exam", 2049: "[PAD2049]"}  # fmt: skip
    assert {id: found.tokens[id] for id in texts} == texts
    assert (found.scores[1000], found.scores[2048], found.unknown) == (-696.0, -10000.0, 3)


def test_tokens_that_were_added_later_are_kept() -> None:
    tokenizer = load_tokenizer(TINY)
    add_tokens(tokenizer, ["<my_tool>"])  # text, which a text may hold
    tokenizer.add_tokens(["<my_turn>"])
    found = read_vocabulary(tokenizer, rows=2064)
    assert found.tokens[2048:2050] == ["<my_tool>", "<my_turn>"]
    assert found.kinds[2048:2051] == [USER_DEFINED, CONTROL, UNUSED]


def test_a_tensor_is_dropped_before_the_next_one_is_read(folders: dict[str, Path], tmp_path: Path) -> None:
    class Counted(MergedWeights):
        last: Any = None

        def tensor(self, name: str) -> Tensor:
            assert self.last is None or self.last() is None, name
            made = super().tensor(name)
            self.last = weakref.ref(made)
            return made

    weights, tokenizer = Counted(place_of(folders["gemma2"]), []), load_tokenizer(TINY)
    vocabulary = read_vocabulary(tokenizer, rows=weights.vocab_size)
    write_gguf(plan_gguf(weights, "f32"), weights, tokenizer, vocabulary, tmp_path / "x.gguf", name="x")


@pytest.mark.parametrize("kind", get_args(GgufType))
def test_the_blocks_of_a_tensor_do_not_show(
    kind: GgufType, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folders["gemma2"], tmp_path / "whole.gguf", kind)
    monkeypatch.setattr(gguf_file, "ELEMENTS_AT_ONCE", 1000)
    write(folders["gemma2"], tmp_path / "blocks.gguf", kind)
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "blocks.gguf").read_bytes()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_one_that_llama_cpp_computes_or_does_not_know(preset: str) -> None:
    family = FAMILIES[PRESETS[preset].model_type]
    if family.gguf is not None:
        check_for_llama_cpp(PRESETS[preset].config())
        return
    with pytest.raises(UserError) as error:
        check_for_llama_cpp(PRESETS[preset].config())
    assert str(error.value) == f"config.json: llama.cpp knows no {family.label}; use --to hf"


ELSE = "use --to hf instead"
FILE = "whatever the file says"


@pytest.mark.parametrize(
    ("preset", "changes", "line"),
    [
        ("gemma-2-9b", {"query_pre_attn_scalar": 224},
         f"config.json: query_pre_attn_scalar is 224, but llama.cpp takes 256 (head_dim) {FILE}; {ELSE}"),
        ("gemma-2-27b", {"query_pre_attn_scalar": 128},
         "config.json: query_pre_attn_scalar is 128, but llama.cpp takes 144 (hidden_size / num_attention_heads) "
         f"{FILE}; {ELSE}"),
        ("gemma-2-27b", {"num_hidden_layers": 4, "layer_types": None},
         f"config.json: query_pre_attn_scalar is 144, but llama.cpp takes 128 (head_dim) {FILE}; {ELSE}"),
        ("gemma-2-2b", {"final_logit_softcapping": None},
         f"config.json: a soft-cap is null, but llama.cpp always caps a Gemma 2; {ELSE}"),
        ("gemma-2-2b", {"attn_logit_softcapping": None},
         f"config.json: a soft-cap is null, but llama.cpp always caps a Gemma 2; {ELSE}"),
        ("gemma-2-2b", {"layer_types": ["full_attention", "sliding_attention"] * 13},
         f"config.json: layer_types: llama.cpp has a window in layers 0, 2, 4, ... and no other; {ELSE}"),
    ],
)  # fmt: skip
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(
    preset: str, changes: dict[str, Any], line: str
) -> None:
    with pytest.raises(UserError) as error:
        check_for_llama_cpp(PRESETS[preset].config(**changes))
    assert str(error.value) == line


def test_no_window_is_a_window_of_the_whole_context(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", "gemma-2-9b")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_types": ["full_attention"] * 2}))
    assert values(write(folder, tmp_path / "x.gguf"))["gemma2.attention.sliding_window"] == 256


def spoil(folder: Path, name: str, value: float) -> None:
    """Put one value into a weight of a folder."""
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[-1] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_what_does_not_fit_float16_is_refused(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", "gemma-2-9b")
    spoil(folder, "model.layers.1.mlp.up_proj.weight", -70000.0)
    with pytest.raises(UserError) as error:
        write(folder, tmp_path / "x.gguf", "f16")
    assert str(error.value) == (
        "model.layers.1.mlp.up_proj.weight: holds 70000, and float16 ends at 65504; use --gguf-type bf16 or q8_0"
    )
    assert stored(write(folder, tmp_path / "y.gguf", "q8_0"), "blk.1.ffn_up.weight").min() == pytest.approx(-7e4, 1e-3)


def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", "gemma-2-9b")
    spoil(folder, "model.norm.weight", float("nan"))
    with pytest.raises(UserError) as error:
        write(folder, tmp_path / "x.gguf")
    assert str(error.value) == "model.norm.weight: holds NaN or infinity; the training diverged, use a checkpoint"


def test_rows_that_q8_0_cannot_cut_are_refused(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", "gemma-2-2b")
    with pytest.raises(UserError) as error:
        write(folder, tmp_path / "x.gguf", "q8_0")
    assert str(error.value) == (
        "model.embed_tokens.weight: q8_0 stores blocks of 32, and its rows have 144 elements; use --gguf-type bf16"
    )


def test_more_tokens_than_rows_are_refused() -> None:
    with pytest.raises(UserError) as error:
        read_vocabulary(load_tokenizer(TINY), rows=2000)
    assert str(error.value) == (
        f"{TINY}: the tokenizer has 2,048 tokens, the embedding 2,000 rows; "
        "restore the tokenizer files that were saved with the weights"
    )


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError) as error:
        gguf_library()
    assert str(error.value) == "--to gguf needs the package gguf; install it with: pip install 'gemma-ft[gguf]'"


def test_a_written_file_is_held_against_its_plan(tmp_path: Path) -> None:
    """A tensor too many, one of another shape, name or type, and a file cut short: nothing for a user to fetch."""
    out = tmp_path / "x.gguf"
    write(Path(TINY), out, "bf16")
    tensors = plan_gguf(MergedWeights(place_of(TINY), []), "bf16").tensors
    verify_gguf(out, tensors)
    first = tensors[0]
    assert len(first.shape) == 2
    for wrong in (
        [],
        [replace(first, name="blk.9.x")],
        [replace(first, shape=first.shape[::-1])],
        [replace(first, stored="f16")],  # of as many bytes
        [replace(first, bytes=first.bytes // 2)],
    ):
        with pytest.raises(AssertionError, match="not as planned"):
            verify_gguf(out, [*wrong, *tensors[1:]])
    out.write_bytes(out.read_bytes()[:-32])
    with pytest.raises(AssertionError, match="cut short"):
        verify_gguf(out, tensors)


def test_bf16_weights_are_stored_as_they_are(tmp_path: Path) -> None:
    reader = write(Path(TINY), tmp_path / "x.gguf", "bf16")
    weight = load_file(Path(TINY) / "model.safetensors")["model.embed_tokens.weight"]
    found = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    assert found.data.tobytes() == weight.view(torch.int16).numpy().tobytes()
