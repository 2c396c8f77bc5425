"""`gemma-ft import`: what a GGUF file holds comes back to the byte, and what it does not is taken from the record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemma_ft.build.contract import Contract
from gemma_ft.data.encode.tokenizer import ContentEncoder, add_tokens, load_tokenizer
from gemma_ft.data.encode.tokenizer_files import save_tokenizer
from gemma_ft.export.form_names import GgufType
from gemma_ft.export.gguf_import import weights_of_file
from gemma_ft.export.gguf_import.import_gguf import import_gguf, plan_import
from tests.export.files_to_import import exported, rewritten
from tests.export.tuned import TINY, names_in, save_base, tensors

gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
SHAPES = ("gemma-2b", "gemma-7b", "gemma-2-2b", "gemma-2-9b")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {shape: save_base(root / shape, shape) for shape in SHAPES}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Gemma as a bf16 file: its sizes are a record's."""
    return exported(TINY, tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.mark.parametrize("kind", ["f32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_export_import_export_is_the_same_to_the_byte(
    shape: str, kind: GgufType, bases: dict[str, Path], tmp_path: Path
) -> None:
    first = exported(bases[shape], tmp_path / "1" / "x.gguf", kind)
    found = import_gguf(first, tmp_path / "again", config=bases[shape] / "config.json")
    assert found.notes() == []
    assert exported(tmp_path / "again", tmp_path / "2" / "x.gguf", kind).read_bytes() == first.read_bytes()


def test_what_was_written_in_bf16_is_bf16_again(tiny: Path, tmp_path: Path) -> None:
    """The record of the tiny Gemma, its weights, its tokenizer and how its chats are written."""
    import_gguf(tiny, tmp_path / "again")
    before, after = tensors(Path(TINY)), tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(after[name].dtype == torch.bfloat16 and torch.equal(after[name], before[name]) for name in before)
    ours, again = load_tokenizer(TINY), load_tokenizer(str(tmp_path / "again"))
    assert ContentEncoder(ours).sha256 == ContentEncoder(again).sha256
    assert ours.chat_template == again.chat_template
    assert exported(tmp_path / "again", tmp_path / "2" / "tiny.gguf").read_bytes() == tiny.read_bytes()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (Path(TINY), tmp_path / "again")]
    assert {key: value for key, value in configs[1].items() if key in configs[0]} == configs[0]


def test_norms_that_bf16_cannot_hold_keep_float32(bases: dict[str, Path], tmp_path: Path) -> None:
    file = exported(bases["gemma-2-9b"], tmp_path / "1" / "x.gguf", "bf16")
    import_gguf(file, tmp_path / "again", config=bases["gemma-2-9b"] / "config.json")
    before, after = load_file(bases["gemma-2-9b"] / "model.safetensors"), tensors(tmp_path / "again")
    for name, weight in before.items():
        expected = (weight + 1) - 1 if "norm" in name else weight.bfloat16().float()
        assert torch.equal(after[name], expected), name


def test_the_folder_is_what_transformers_and_we_open(bases: dict[str, Path], tmp_path: Path) -> None:
    file = exported(bases["gemma-2-2b"], tmp_path / "1" / "x.gguf", "f32")
    import_gguf(file, tmp_path / "again", config=bases["gemma-2-2b"] / "config.json")
    ids = torch.randint(4, 2048, (1, 21), generator=torch.Generator().manual_seed(0))
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (bases["gemma-2-2b"], tmp_path / "again")]
    with torch.no_grad():
        before, after = (model(ids).logits for model in models)
    torch.testing.assert_close(after, before, rtol=0, atol=2e-5 * float(before.abs().max()))
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (bases["gemma-2-2b"], tmp_path / "again")]
    chat = [{"role": "user", "content": " Plan  lunch\n\nat 12:30. "}]
    rendered = [one.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for one in tokenizers]
    assert rendered[0] == rendered[1]
    assert models[1].generation_config.eos_token_id == [1, 6]


def test_a_tuned_model_keeps_its_contract(made: Path, tmp_path: Path) -> None:
    file = exported(made / "run" / "model", tmp_path / "1" / "x.gguf", "f32")
    import_gguf(file, tmp_path / "again", config=made / "run" / "model" / "config.json")
    before, after = Contract.read(made / "run" / "model"), Contract.read(tmp_path / "again")
    assert before is not None
    assert after is not None
    assert (after.tokenizer_sha256, after.template_sha256, after.base) == (
        before.tokenizer_sha256, before.template_sha256, "base",
    )  # fmt: skip
    assert exported(tmp_path / "again", tmp_path / "2" / "x.gguf", "f32").read_bytes() == file.read_bytes()


def test_tokens_of_the_user_are_text_again(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "gemma-2-9b")
    tokenizer = load_tokenizer(TINY)
    add_tokens(tokenizer, ["<my_tool>"])
    save_tokenizer(tokenizer, base, system_policy="fold")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(2064)
    model.save_pretrained(base)
    file = exported(base, tmp_path / "1" / "x.gguf", "f32")
    import_gguf(file, tmp_path / "again", config=base / "config.json")
    again = load_tokenizer(str(tmp_path / "again"))
    assert ContentEncoder(again).encode("<my_tool>") == [2048]
    assert ContentEncoder(again).sha256 == ContentEncoder(tokenizer).sha256
    assert exported(tmp_path / "again", tmp_path / "2" / "x.gguf", "f32").read_bytes() == file.read_bytes()


TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "F32", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
         "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"]  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_that_gguf_widens(kind: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random blocks of each type, also where a tensor is read in several goes."""
    stored_as = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[stored_as]
    name = "blk.3.ffn_down.weight"  # [128, 512]
    raw = np.random.default_rng(0).integers(0, 60, (128, 512 // block * size), dtype=np.uint8)
    if kind in ("F32", "F16", "BF16"):
        raw = np.zeros_like(raw)
        raw[:, 1::2] = 60

    def change(fields: dict[str, Any], stored: dict[str, Any]) -> None:
        stored[name] = (raw, stored_as)

    monkeypatch.setattr(weights_of_file, "ELEMENTS_AT_ONCE", 5000)
    expected = gguf.quants.dequantize(raw, stored_as)
    assert np.isfinite(expected).all()
    import_gguf(rewritten(tiny, tmp_path / "x.gguf", change=change), tmp_path / "out", dtype="float32")
    assert (tensors(tmp_path / "out")["model.layers.3.mlp.down_proj.weight"].numpy() == expected).all()


def test_what_bf16_costs_is_told(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["gemma-2-9b"]
    file = exported(base, tmp_path / "1" / "x.gguf", "f32")
    found = import_gguf(file, tmp_path / "out", dtype="bf16", config=base / "config.json")
    (note,) = found.notes()
    values = load_file(base / "model.safetensors")
    values = {name: (value + 1) - 1 if "norm" in name else value for name, value in values.items()}
    off = torch.cat([((value.bfloat16().float() - value).abs() / value.abs()).reshape(-1) for value in values.values()])
    assert note == (
        f"rounded to bf16: relative to the file's numbers at most {float(off.max()):.2g}, on average "
        f"{float(off.double().mean()):.2g}"
    )


def test_shards_and_one_file_hold_the_same(tiny: Path, tmp_path: Path) -> None:
    planned = plan_import(tiny, tmp_path / "out")
    for name, most in (("one", 10**9), ("many", 100_000)):
        (tmp_path / name).mkdir()
        planned.weights.write(tmp_path / name, lambda done, total: None, max_shard_bytes=most)
    one, many = (tensors(tmp_path / name) for name in ("one", "many"))
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def no_template(fields: dict[str, Any], stored: dict[str, Any]) -> None:
    del fields["tokenizer.chat_template"]


def test_a_pretrained_file_is_told_as_one(tiny: Path, tmp_path: Path) -> None:
    file = rewritten(tiny, tmp_path / "x.gguf", change=no_template)
    found = import_gguf(file, tmp_path / "out")
    assert found.notes() == [
        "the file has no chat template: taken for a pretrained model, which does not answer in turns"
    ]
    assert names_in(tmp_path / "out") == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert "does not answer in turns" in (tmp_path / "out" / "README.md").read_text()
    assert load_tokenizer(str(tmp_path / "out")).chat_template  # ours, for who tunes it


def test_a_context_of_the_file_s_own_is_taken_and_told(tiny: Path, tmp_path: Path) -> None:
    def change(fields: dict[str, Any], stored: dict[str, Any]) -> None:
        fields["gemma2.context_length"] = (4096, gguf.GGUFValueType.UINT32, None)

    found = import_gguf(rewritten(tiny, tmp_path / "x.gguf", change=change), tmp_path / "out")
    assert found.notes() == ["the file's context of 4,096 tokens was taken, the record has 2,048"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 4096
