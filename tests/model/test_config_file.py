"""Which size a folder is, before transformers is imported: Gemma 3 in the spellings in which folders are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3Config

from gemma_ft.errors import UserError
from gemma_ft.families.records import PRESETS
from gemma_ft.model.config_file import check_size

# Published text_config of 4B; of larger ones the sizes that differ from the class's defaults are said too.
TEXT_4B = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
           "sliding_window": 1024, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}  # fmt: skip
TEXT_12B = {**TEXT_4B, "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48,
            "num_attention_heads": 16, "num_key_value_heads": 8}  # fmt: skip
OLD_1B = {"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
          "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
          "sliding_window_pattern": 6, "rope_theta": 1_000_000, "rope_local_base_freq": 10_000, "rope_scaling": None,
          "query_pre_attn_scalar": 256, "vocab_size": 262_144}  # fmt: skip


def folder_of(folder: Path, fields: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder


def composite(text: dict[str, Any]) -> dict[str, Any]:
    """As an instruct folder has it, with its two ends of an answer."""
    return {"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": text, "vision_config": {}}


@pytest.mark.parametrize(
    ("fields", "preset", "wrong", "why"),
    [
        (composite(TEXT_4B), "gemma-3-4b", "gemma-3-12b", "num_hidden_layers 34, not 48"),
        (composite(TEXT_12B), "gemma-3-12b", "gemma-3-4b", "num_hidden_layers 48, not 34"),
        (composite(TEXT_4B), "gemma-3-4b", "gemma-2-2b", "model_type gemma3_text, not gemma2"),
        (OLD_1B, "gemma-3-1b", "gemma-3-270m", "num_hidden_layers 26, not 18"),
        (OLD_1B, "gemma-3-1b", "vaultgemma-1b", "model_type gemma3_text, not vaultgemma"),
    ],
)
def test_a_folder_as_published_is_its_size_and_a_wrong_preset_names_it(
    fields: dict[str, Any], preset: str, wrong: str, why: str, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path, fields)
    check_size(folder, preset, "DIR")
    with pytest.raises(UserError) as refused:
        check_size(folder, wrong, "DIR")
    assert str(refused.value) == f"model.preset: DIR is not a {wrong} ({why}); set model.preset: {preset}"


@pytest.mark.parametrize("preset", [name for name, one in PRESETS.items() if one.model_type == "gemma3_text"])
@pytest.mark.parametrize("several", [False, True], ids=["text", "composite"])
def test_a_folder_as_transformers_writes_it_is_its_size(preset: str, several: bool, tmp_path: Path) -> None:
    config = PRESETS[preset].config()
    (Gemma3Config(text_config=config.to_dict()) if several else config).save_pretrained(tmp_path)
    check_size(tmp_path, preset, "DIR")
    for other in PRESETS:
        if other != preset:
            with pytest.raises(UserError, match=f"set model.preset: {preset}$"):
                check_size(tmp_path, other, "DIR")


def test_a_size_that_is_none_of_ours_names_no_preset(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, composite({**TEXT_4B, "num_hidden_layers": 35}))
    with pytest.raises(UserError) as refused:
        check_size(folder, "gemma-3-4b", "DIR")
    assert str(refused.value) == (
        "model.preset: DIR is not a gemma-3-4b (num_hidden_layers 35, not 34); set model.preset to the size that it is"
    )


def test_a_folder_of_several_models_that_says_nothing_of_its_text_is_the_config_class_s_own(tmp_path: Path) -> None:
    """Which is no published size: no preset has these numbers, and transformers fills them in likewise."""
    check_size(folder_of(tmp_path, {"model_type": "gemma3"}), "gemma-3-4b", "DIR")
