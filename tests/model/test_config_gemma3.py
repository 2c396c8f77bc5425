"""A Gemma 3's config.json in the words of any version of transformers, and what of it is refused, at once."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gemma_ft.build.pretrained import load_model
from gemma_ft.cli.app import main
from gemma_ft.errors import UserError
from gemma_ft.families.family import LayerKind, Rope
from gemma_ft.families.records import GEMMA_2, GEMMA_3, PRESETS
from gemma_ft.model.config import GemmaNumerics, read_config

ROOT = Path(__file__).parents[2]
SIZES = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 8,
         "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 1024,
         "query_pre_attn_scalar": 256}  # fmt: skip
FULL = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0}
SLIDING = {"rope_type": "default", "rope_theta": 10_000.0}
NEW = {"rope_parameters": {"full_attention": FULL, "sliding_attention": SLIDING}}
OLD_SCALING = {"rope_type": "linear", "factor": 8.0}
OLD = {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0, "rope_scaling": OLD_SCALING}
EVERY_SIXTH = ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"] * 2
SPELLINGS: dict[str, dict[str, Any]] = {
    "new": {**NEW, "layer_types": EVERY_SIXTH},
    "new, without types": NEW,
    "new, sliding left out": {"rope_parameters": {"full_attention": FULL}},
    "new, bases left out": {"rope_parameters": {"full_attention": OLD_SCALING, "sliding_attention": None}},
    "new, by type": {"rope_parameters": {"full_attention": {"type": "linear", "factor": 8.0}}},
    "old": {**OLD, "sliding_window_pattern": 6},
    "old, bases left out": {"rope_scaling": OLD_SCALING},
    "both, as if by hand": {**OLD, "rope_parameters": {"full_attention": SLIDING, "sliding_attention": SLIDING},
                            "rope_scaling": FULL},
}  # fmt: skip


def written(folder: Path, fields: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def in_both_ways(folder: Path, fields: dict[str, Any]) -> tuple[LayerKind, ...]:
    """The layers of a file, which are the same as it lies there and through transformers."""
    layers = GEMMA_3.layers(fields)
    assert GemmaNumerics.from_config(read_config(written(folder, fields))).layers == layers
    return layers


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_same_layers(spelling: str, tmp_path: Path) -> None:
    """Traps 3 to 5: the factor is of full layers alone, whichever way it is written."""
    full, sliding = Rope(1_000_000.0, "linear", 8.0), Rope(10_000.0)
    expected = tuple(
        LayerKind(256, 4, 10240, None if index == 5 else 1024, full if index == 5 else sliding) for index in range(8)
    )
    assert in_both_ways(tmp_path, {**SIZES, **SPELLINGS[spelling]}) == expected


def test_other_numbers_are_read_in_either_spelling(tmp_path: Path) -> None:
    full, sliding = Rope(5e5, "linear", 4.0), Rope(7e3)
    old = {"rope_theta": 5e5, "rope_local_base_freq": 7e3, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    new = {"full_attention": {"rope_theta": 5e5, **old["rope_scaling"]}, "sliding_attention": {"rope_theta": 7e3}}
    for more in ({**old, "sliding_window_pattern": 2}, {"rope_parameters": new, "sliding_window_pattern": 2}):
        layers = in_both_ways(tmp_path, {**SIZES, **more})
        assert [kind.rope for kind in layers] == [sliding, full] * 4
        assert [kind.sliding_window for kind in layers] == [1024, None] * 4
    stored = ["full_attention", *["sliding_attention"] * 7]
    layers = in_both_ways(tmp_path, {**SIZES, "sliding_window_pattern": 2, "layer_types": stored})
    assert [kind.sliding_window for kind in layers] == [None] + [1024] * 7, "the list wins over the pattern"


def test_a_factor_counts_where_the_type_is_linear(tmp_path: Path) -> None:
    """transformers does not divide by the factor of a RoPE of type "default"."""
    ropes = {"full_attention": {**FULL, "rope_type": "default"}, "sliding_attention": SLIDING}
    layers = in_both_ways(tmp_path, {**SIZES, "rope_parameters": ropes})
    assert layers[5].rope == Rope(1_000_000.0)


def test_what_is_left_out_is_what_the_config_class_says(tmp_path: Path) -> None:
    """Of no published size: the text_config of a 4B leaves some out."""
    fields = {"model_type": "gemma3_text", "num_hidden_layers": 7}
    assert in_both_ways(tmp_path, fields)[0] == LayerKind(256, 4, 9216, 4096, Rope(10_000.0))
    config = read_config(tmp_path).to_dict()
    assert {name: config[name] for name in GEMMA_3.defaults if name in config and name != "num_hidden_layers"} == {
        name: value for name, value in GEMMA_3.defaults.items() if name != "num_hidden_layers"
    }


def ropes(**full: Any) -> dict[str, Any]:
    """A file whose full layers have this RoPE."""
    return {"rope_parameters": {"full_attention": {"rope_theta": 1e6, **full}, "sliding_attention": SLIDING}}


def no_type(name: str) -> str:
    return f"config.json: rope_type {name!r} is not supported; Gemma 3 uses 'default' and 'linear'"


FLAT = (
    "config.json: rope_parameters has {!r} beside its types of layers, which transformers ignores; put it under "
    "full_attention and sliding_attention"
)
BY_TYPE = "config.json: a RoPE has type 'linear', which transformers ignores in a Gemma 3; call it rope_type"
ENCODER = "config.json: use_bidirectional_attention is set; this is an encoder, not a causal Gemma"
LLAMA = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "both directions": ({"use_bidirectional_attention": True}, ENCODER),
    "a cap on attention": (
        {"attn_logit_softcapping": 50.0},
        "config.json: attn_logit_softcapping 50.0 is set, which transformers ignores in a Gemma 3; set it to null, or "
        "fetch the file again",
    ),
    "flat": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, FLAT.format("rope_theta")),
    "flat, linear": ({"rope_parameters": {"rope_type": "linear", "factor": 8.0}}, FLAT.format("factor")),
    "beside": ({"rope_parameters": {**NEW["rope_parameters"], "factor": 8.0}}, FLAT.format("factor")),
    "yarn": (ropes(rope_type="yarn", factor=8.0), no_type("yarn")),
    "dynamic": (ropes(rope_type="dynamic", factor=8.0), no_type("dynamic")),
    "llama3": (ropes(**LLAMA), no_type("llama3")),
    "proportional": (ropes(rope_type="proportional", partial_rotary_factor=0.25), no_type("proportional")),
    "no type that there is": (ropes(rope_type="spiral"), no_type("spiral")),
    "old yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, no_type("yarn")),
    "old, by type": ({"rope_scaling": {"type": "linear", "factor": 8.0}}, BY_TYPE),
    "another type of layer": (
        {"layer_types": ["chunked_attention"] * 18},
        "config.json: layer_types has 'chunked_attention'; the layers of a Gemma 3 are full_attention or "
        "sliding_attention",
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Gemma 3 270M without weights: what is refused of its config is refused before they are looked for."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((ROOT / "data" / "gemma-tiny" / name).read_bytes())
    return tmp_path


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_in_one_line_by_every_door(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    change, message = REFUSED[case]
    written(folder, {**PRESETS["gemma-3-270m"].fields, "model_type": "gemma3_text", **change})
    run = folder / "run"
    recipe = ["sft_tiny", f"model.weights={folder}", "model.preset=gemma-3-270m", f"output_dir={run}"]
    for words in (["generate", str(folder), "--prompt", "Hello"], ["train", *recipe], ["plan", *recipe]):
        assert main(words) == 2
        told = capsys.readouterr().err.splitlines()
        assert told == [message], words
    assert not run.exists()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING], "and nothing beside it"


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_where_a_model_is_made_of_a_config(case: str, tmp_path: Path) -> None:
    """The weights do not fit either: nobody looks."""
    change, message = REFUSED[case]
    save_file({"nothing": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    fields = {**PRESETS["gemma-3-270m"].fields, "model_type": "gemma3_text", **change}
    with pytest.raises(UserError) as raised:
        load_model(written(tmp_path, fields), dtype=torch.float32)
    why = message.removeprefix("config.json: ")
    assert str(raised.value) == f"{tmp_path}/config.json: cannot be read as a Gemma's: {why}"
    with pytest.raises(UserError) as raised:
        GemmaNumerics.from_config(read_config(tmp_path))
    assert str(raised.value) == message


def test_it_is_refused_in_the_text_part_of_a_folder_of_several_models(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = {**SIZES, **NEW, "use_bidirectional_attention": True}
    written(folder, {"model_type": "gemma3", "text_config": text})
    assert main(["generate", str(folder), "--prompt", "Hello"]) == 2
    assert capsys.readouterr().err.splitlines() == [ENCODER]


def test_a_gemma_2_is_refused_a_type_of_layer_that_it_has_not() -> None:
    config = PRESETS["gemma-2-2b"].config(num_hidden_layers=2, layer_types=["full_attention", "chunked_attention"])
    with pytest.raises(UserError) as raised:
        GemmaNumerics.from_config(config)
    assert str(raised.value) == (
        "config.json: layer_types has 'chunked_attention'; the layers of a Gemma 2 are full_attention or "
        "sliding_attention"
    )
    assert GEMMA_2.layers({"num_hidden_layers": 2})[0].sliding_window == 4096
