"""A Gemma 3 as a GGUF file: what llama.cpp reads of it, and what it would compute otherwise. D- and R-numbers are known
disagreements and faults of implementations.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken

from gemma_ft.cli.app import main
from gemma_ft.data.encode.tokenizer import load_tokenizer
from gemma_ft.errors import UserError
from gemma_ft.export.form_names import GgufType
from gemma_ft.export.gguf_check import check_for_llama_cpp
from gemma_ft.export.gguf_pieces import CONTROL
from gemma_ft.export.gguf_tokenizer import read_vocabulary, token_count
from gemma_ft.families.records import GEMMA_3, PRESETS
from tests.export.gguf_files import SIZES, gguf, save_gemma_3, stored, values, write
from tests.export.tuned import TINY

ELSE = "use --to hf instead"
FILE = "whatever the file says"
LINEAR = {"rope_theta": 10_000.0, "rope_type": "linear", "factor": 8.0}
GLOBAL = {"rope_theta": 1e6, "rope_type": "default"}
STEPS = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8, "q8_0": 0.5 / 127 + 2.0**-11}  # of the largest in a block of 32


@pytest.mark.parametrize("kind", get_args(GgufType))
def test_every_weight_comes_back_and_1_is_added_to_each_norm(kind: GgufType, tmp_path: Path) -> None:
    """Norms of queries and keys as well: 7 layers of 6 norms, and the last one."""
    folder = save_gemma_3(tmp_path / "base", "gemma-3-270m")
    reader, weights = write(folder, tmp_path / "x.gguf", kind), load_file(folder / "model.safetensors")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, 7)
    found = {name: names.get_name(name, try_suffixes=(".weight",)) for name in weights}
    assert {tensor.name for tensor in reader.tensors} == set(found.values())
    norms = [name for name in weights if "norm" in name]
    assert len(norms) == 7 * 6 + 1
    assert found["model.layers.6.self_attn.q_norm.weight"] == "blk.6.attn_q_norm.weight"
    for name, weight in weights.items():
        expected, values = weight.numpy(), stored(reader, found[name])
        if name in norms:
            assert values.tobytes() == (expected + np.float32(1)).tobytes(), name
            continue
        largest = np.repeat(np.abs(expected).reshape(-1, 32).max(axis=1), 32).reshape(expected.shape)
        assert (np.abs(values - expected) <= STEPS[kind] * largest).all(), name


def test_all_that_llama_cpp_reads_of_a_gemma_3(tmp_path: Path) -> None:
    """As the published file of the 270M has it (llama.cpp's converter), and what its defaults would be."""
    found = values(write(save_gemma_3(tmp_path / "base", "gemma-3-270m"), tmp_path / "x.gguf", "bf16"))
    assert {key: value for key, value in found.items() if not key.startswith("tokenizer.")} == {
        "general.architecture": "gemma3",
        "general.type": "model",
        "general.name": "x",
        "general.file_type": 32,
        "gemma3.context_length": 2048,
        "gemma3.embedding_length": 96,
        "gemma3.block_count": 7,
        "gemma3.feed_forward_length": 160,
        "gemma3.attention.head_count": 4,
        "gemma3.attention.head_count_kv": 1,
        "gemma3.attention.key_length": 32,
        "gemma3.attention.value_length": 32,
        "gemma3.rope.dimension_count": 32,
        "gemma3.rope.freq_base": 1e6,
        "gemma3.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "gemma3.vocab_size": 2048,
        "gemma3.attention.sliding_window": 16,
    }
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_space_prefix"]) == (True, False)


@pytest.mark.parametrize("size", SIZES)
def test_r14_the_factor_of_full_layers_is_in_the_file(size: str, tmp_path: Path) -> None:
    """8 from 4B on, none in 270M and 1B; the base is that of full layers, also where the last layer has a window."""
    found = values(write(save_gemma_3(tmp_path / "base", size), tmp_path / "x.gguf"))
    scaling = {name.removeprefix("gemma3.rope."): value for name, value in found.items() if "rope" in name}
    expected: dict[str, Any] = {"dimension_count": 32, "freq_base": 1e6}
    if size not in ("gemma-3-270m", "gemma-3-1b"):
        expected |= {"scaling.type": "linear", "scaling.factor": 8.0}
    assert scaling == expected


def test_a_final_cap_is_in_the_file_where_the_config_sets_one(tmp_path: Path) -> None:
    folder = save_gemma_3(tmp_path / "base", "gemma-3-270m", final_logit_softcapping=30.0)
    assert values(write(folder, tmp_path / "x.gguf"))["gemma3.final_logit_softcapping"] == 30.0


def test_d16_rows_without_a_token_stay_away(tmp_path: Path) -> None:
    """A table of 2,112 rows, as 4B and larger have 262,208, and a tokenizer of 2,048 tokens."""
    folder = save_gemma_3(tmp_path / "base", "gemma-3-4b")
    reader = write(folder, tmp_path / "x.gguf")
    found, weights = values(reader), load_file(folder / "model.safetensors")
    rows, norm = weights["model.embed_tokens.weight"], weights["model.norm.weight"]
    assert rows.shape == (2112, 96)
    assert stored(reader, "token_embd.weight").tobytes() == rows[:2048].numpy().tobytes()
    assert stored(reader, "output_norm.weight").tobytes() == (norm.numpy() + np.float32(1)).tobytes()
    assert found["gemma3.vocab_size"] == len(found["tokenizer.ggml.tokens"]) == 2048
    assert "[PAD2047]" not in found["tokenizer.ggml.tokens"]


def with_image_token(name: str = "<image_soft_token>") -> Any:
    tokenizer = load_tokenizer(TINY)
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False)], special_tokens=True)
    return tokenizer


def test_the_image_token_is_left_out_where_the_table_has_no_row_for_it() -> None:
    """270M and 1B: 262,144 rows, and a tokenizer of 262,145 tokens; from 4B on there is a row for it."""
    assert GEMMA_3.composite is not None
    tokenizer, soft = with_image_token(), GEMMA_3.composite.soft_tokens
    assert token_count(tokenizer) == 2049
    assert read_vocabulary(tokenizer, rows=2048, soft=soft) == read_vocabulary(load_tokenizer(TINY), rows=2048)
    larger = read_vocabulary(tokenizer, rows=2049, soft=soft)
    assert (larger.tokens[2048], larger.kinds[2048]) == ("<image_soft_token>", CONTROL)


@pytest.mark.parametrize("name", ["<my_turn>", "<image_soft_token>x"])
def test_any_other_token_beyond_the_table_is_refused(name: str) -> None:
    with pytest.raises(UserError) as error:
        read_vocabulary(with_image_token(name), rows=2048, soft=("<image_soft_token>",))
    assert str(error.value) == (
        f"{TINY}: the tokenizer has 2,049 tokens, the embedding 2,048 rows; "
        "restore the tokenizer files that were saved with the weights"
    )


@pytest.mark.parametrize(
    ("preset", "changes", "line"),
    [
        # D14: by the number of layers
        ("gemma-3-27b", {"query_pre_attn_scalar": 128},
         "query_pre_attn_scalar is 128, but llama.cpp takes 168 (hidden_size / num_attention_heads) " + FILE),
        ("gemma-3-27b", {"num_hidden_layers": 6, "layer_types": None},
         f"query_pre_attn_scalar is 168, but llama.cpp takes 128 (head_dim) {FILE}"),
        ("gemma-3-4b", {"query_pre_attn_scalar": 320},
         f"query_pre_attn_scalar is 320, but llama.cpp takes 256 (head_dim) {FILE}"),
        ("gemma-3-270m", {"layer_types": ["sliding_attention"] * 18},
         "layer_types: llama.cpp has a window in layers 0, 1, 2, ... and no other"),
        ("gemma-3-270m", {"layer_types": ["full_attention"] * 18},
         "layer_types: llama.cpp has a window in layers 0, 1, 2, ... and no other"),
        ("gemma-3-270m", {"rope_parameters": {"full_attention": GLOBAL, "sliding_attention": LINEAR}},
         "layers with a window have rope_theta 10000 and factor 8, but llama.cpp takes 10000 and 1 there, " + FILE),
        ("gemma-3-270m", {"rope_parameters": {"full_attention": GLOBAL, "sliding_attention": GLOBAL}},
         "layers with a window have rope_theta 1e+06 and factor 1, but llama.cpp takes 10000 and 1 there, " + FILE),
    ],
)  # fmt: skip
def test_d14_r14_what_llama_cpp_would_compute_otherwise_is_refused(
    preset: str, changes: dict[str, Any], line: str
) -> None:
    with pytest.raises(UserError) as error:
        check_for_llama_cpp(PRESETS[preset].config(**changes))
    assert str(error.value) == f"config.json: {line}; {ELSE}"


def test_a_vaultgemma_is_refused_before_tokenizer_or_weights_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "base", tmp_path / "x.gguf"
    PRESETS["vaultgemma-1b"].config().save_pretrained(str(folder))
    (folder / "model.safetensors").write_bytes(b"damaged")
    (folder / "tokenizer.json").write_text("damaged")
    assert main(["export", str(folder), "--to", "gguf", "--out", str(out)]) == 2
    assert capsys.readouterr().err.splitlines() == ["config.json: llama.cpp knows no VaultGemma; use --to hf"]
    assert not out.exists()


def test_bf16_matrices_are_stored_as_they_are(tmp_path: Path) -> None:
    folder = save_gemma_3(tmp_path / "base", "gemma-3-270m", dtype=torch.bfloat16)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    reader, weights = write(folder, tmp_path / "x.gguf", "bf16"), load_file(folder / "model.safetensors")
    found = next(tensor for tensor in reader.tensors if tensor.name == "blk.6.ffn_down.weight")
    expected = weights["model.layers.6.mlp.down_proj.weight"].view(torch.int16).numpy()
    assert found.data.tobytes() == expected.tobytes()
