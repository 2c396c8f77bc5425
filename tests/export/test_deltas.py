"""The arithmetic of adapters against PEFT, layer by layer, and the one line for each adapter that cannot be merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from gemma_ft.build.place import AdapterFiles
from gemma_ft.errors import UserError
from gemma_ft.export.merge.deltas import Adapter
from gemma_ft.export.merge.low_rank import add_low_rank
from tests.export.tuned import wrap
from tests.parity.amplified import ours, relative


class One(nn.Module):
    """A single linear layer with loud weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 40, bias=False, dtype=dtype)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(40, 24, generator=torch.Generator().manual_seed(3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_one_layer_is_merged_as_peft_merges_it(more: dict[str, Any], dtype: torch.dtype, within: float) -> None:
    wrapped = wrap(One(dtype), target_modules=["layer"], **more).to(dtype)
    lora = wrapped.base_model.model.layer
    a, b = lora.lora_A["default"].weight.data, lora.lora_B["default"].weight.data
    magnitude = lora.lora_magnitude_vector["default"].weight.data if "use_dora" in more else None
    found = add_low_rank(One(dtype).layer.weight.data.clone(), a, b, scale=lora.scaling["default"], magnitude=magnitude)
    assert lora.scaling["default"] == (4.0 if "use_rslora" in more else 2.0)  # alpha 8, rank 4
    x = torch.randn(5, 24, dtype=dtype, generator=torch.Generator().manual_seed(4))
    assert relative(x @ found.T, wrapped(x)) <= within * 3  # the adapter as it is applied, not merged
    assert relative(found, wrapped.merge_and_unload().layer.weight) <= within


def test_a_merge_in_less_than_float32_is_no_merge() -> None:
    with pytest.raises(AssertionError, match="less than float32"):
        add_low_rank(torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(1, 2), torch.ones(2, 1), scale=1.0)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    wrap(ours("gemma-2b"), target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        Adapter.open(AdapterFiles(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(folder), "A")


def set_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors")


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
ONLY = "only LoRA, rsLoRA and DoRA can"


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"lora_bias": True}, f"A/adapter_config.json: lora_bias is set, which cannot be merged; {ONLY}"),
        ({"target_parameters": ["q_proj.weight"]},
         f"A/adapter_config.json: target_parameters is set, which cannot be merged; {ONLY}"),
        ({"trainable_token_indices": [1]}, "A: has rows of 0 tokens, the config names 1; save it again"),
        ({"trainable_token_indices": {"embed_tokens": [1, 3]}},
         "A: has rows of 0 tokens, the config names 2; save it again"),
        ({"trainable_token_indices": {"embed_tokens": []}},
         "A/adapter_config.json: trainable_token_indices: expected ids of tokens, got {'embed_tokens': []}; fetch it "
         "again"),
        ({"trainable_token_indices": [1.5]},
         "A/adapter_config.json: trainable_token_indices: expected ids of tokens, got [1.5]; fetch it again"),
        ({"init_lora_weights": "pissa"},
         "A/adapter_config.json: init_lora_weights 'pissa' rewrote the base; save it as a plain LoRA with PEFT's "
         "path_initial_model_for_weight_conversion"),
        ({"use_dora": True},
         "A: has no lora_magnitude_vector for model.layers.0.self_attn.q_proj.weight; the adapter is not whole, "
         "save it again"),
    ],
)  # fmt: skip
def test_a_config_that_means_something_else_is_refused(fields: dict[str, Any], line: str, adapter: Path) -> None:
    set_config(adapter, **fields)
    assert refused(adapter) == line


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"r": 0}, "r: expected a whole number from 1, got 0"),
        ({"r": True}, "r: expected a whole number from 1, got True"),
        ({"r": "8"}, "r: expected a whole number from 1, got '8'"),
        ({"lora_alpha": "x"}, "lora_alpha: expected a finite number, got 'x'"),
        ({"lora_alpha": None}, "lora_alpha: expected a finite number, got None"),
        ({"lora_alpha": float("inf")}, "lora_alpha: expected a finite number, got inf"),
        ({"lora_alpha": 10**400}, f"lora_alpha: expected a finite number, got {10**400}"),
        ({"rank_pattern": [1]}, "rank_pattern: expected a pattern of names for each value, got [1]"),
        ({"rank_pattern": None}, "rank_pattern: expected a pattern of names for each value, got None"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern: q_proj: expected a whole number from 1, got 2.5"),
        ({"alpha_pattern": {"(": 3}},
         "alpha_pattern: '(' is no pattern of names"),
        ({"alpha_pattern": {"q_proj": "z"}}, "alpha_pattern: q_proj: expected a finite number, got 'z'"),
    ],
)  # fmt: skip
def test_a_config_with_numbers_that_cannot_be_is_refused(fields: dict[str, Any], line: str, adapter: Path) -> None:
    set_config(adapter, **fields)
    assert refused(adapter) == f"A/adapter_config.json: {line}; fetch it again"


@pytest.mark.parametrize(("alpha", "share"), [(1e308, 1.0), (8, 1e39), (1e200, -1e200)])
def test_a_scale_that_float32_does_not_hold_is_refused(alpha: float, share: float, adapter: Path) -> None:
    set_config(adapter, lora_alpha=alpha)
    with pytest.raises(UserError) as caught:
        Adapter.open(AdapterFiles(adapter), share)
    assert str(caught.value) == (
        f"{adapter}: alpha {alpha} over rank 4, times its weight {share}, overflows float32; give it a smaller weight"
    )


def test_patterns_of_ranks_and_alphas_are_followed(tmp_path: Path) -> None:
    settings = {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"^.*v_proj": 0.5},
    }
    wrap(ours("gemma-2b"), **settings).save_pretrained(tmp_path)
    Adapter.open(AdapterFiles(tmp_path))


@pytest.mark.parametrize("start", ["gaussian", "eva", "orthogonal", "mica", True, False])
def test_a_start_that_leaves_the_base_is_merged(start: Any, adapter: Path) -> None:
    set_config(adapter, init_lora_weights=start)
    assert Adapter.open(AdapterFiles(adapter)).kind == "lora"


def nan_in(weights: dict[str, torch.Tensor]) -> None:
    weights[f"{Q0}.lora_A.weight"][0, 0] = torch.nan


def zero_b(weights: dict[str, torch.Tensor]) -> None:
    for name in weights:
        if "lora_B" in name:
            weights[name].zero_()


def renamed(new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[new] = weights.pop(f"{Q0}.lora_B.weight")

    return change


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (nan_in, f"A: {Q0}.lora_A.weight holds NaN or infinite values; take an earlier checkpoint"),
        (zero_b, "A: every lora_B is zero, so it was never trained; there is nothing to merge"),
        (lambda weights: weights.pop(f"{Q0}.lora_B.weight"),
         "A: has no lora_B for model.layers.0.self_attn.q_proj.weight; the adapter is not whole, save it again"),
        (renamed(f"{Q0}.lora_B.bias"), f"A: {Q0}.lora_B.bias cannot be merged; {ONLY}"),
        (renamed(f"{Q0}.ia3_l"), f"A: {Q0}.ia3_l cannot be merged; {ONLY}"),
        (renamed("prompt_embeddings"), f"A: prompt_embeddings cannot be merged; {ONLY}"),
        (renamed("base_model.model.model.embed_tokens.lora_embedding_A"),
         "A: has no lora_A for model.embed_tokens.weight; the adapter is not whole, save it again"),
    ],
)  # fmt: skip
def test_a_tensor_that_no_merge_can_use_is_refused(change: Any, line: str, adapter: Path) -> None:
    edit(adapter, change)
    assert refused(adapter) == line


APART: list[dict[str, Any]] = [
    *({"modules_to_save": one} for one in (["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"])),
    *({"target_modules": ["q_proj", *one]} for one in (["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"])),
    {"trainable_token_indices": {"lm_head": [3, 4]}},
    {"trainable_token_indices": {"embed_tokens": [3, 4], "lm_head": [3, 5]}},
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", APART, ids=str)
def test_embedding_and_head_that_were_trained_apart_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    wrap(ours("gemma-2b"), **{"target_modules": ["q_proj"], **settings}).save_pretrained(tmp_path)
    assert refused(tmp_path) == (
        "A: embedding and head were trained apart, but are one tensor in every Gemma; train with "
        "ensure_weight_tying=True in PEFT's LoraConfig"
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_dora_on_the_embedding_or_the_head_names_its_own_cure(module: str, tied: bool, tmp_path: Path) -> None:
    """a3dff15 and later advised ensure_weight_tying=True, also where it was set."""
    settings = {"target_modules": [module], "use_dora": True, "ensure_weight_tying": tied}
    wrap(ours("gemma-2b"), **settings).save_pretrained(tmp_path)
    assert refused(tmp_path) == (
        "A: DoRA on the embedding or the head cannot be merged: they are one tensor in every Gemma, and each has its "
        "own magnitude; train them without use_dora, with ensure_weight_tying=True in PEFT's LoraConfig"
    )


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_embedding_and_head_that_were_trained_as_one_are_the_embedding(module: str, tmp_path: Path) -> None:
    settings = {"modules_to_save": [module], "ensure_weight_tying": True}
    wrap(ours("gemma-2b"), target_modules=["q_proj"], **settings).save_pretrained(tmp_path)
    opened = Adapter.open(AdapterFiles(tmp_path))
    base = torch.full_like(ours("gemma-2b").model.embed_tokens.weight.detach(), float("nan"))
    assert opened.apply("model.embed_tokens.weight", base).isfinite().all(), "nothing of the base is left"
    assert not opened.combines
    assert "lm_head.weight" not in opened.targets


RESIZED: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    {"target_modules": ["q_proj"], "trainable_token_indices": [101, 102]},
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", RESIZED, ids=str)
def test_an_adapter_over_a_resized_vocabulary_names_the_cure(settings: dict[str, Any], tmp_path: Path) -> None:
    """What other toolkits save where tokens were added; a3dff15 said "wrong base?", and of the first nothing."""
    base = ours("gemma-2b")
    known, width = base.model.embed_tokens.weight.shape
    base.resize_token_embeddings(known + 2)
    wrap(base, **settings).save_pretrained(tmp_path, save_embedding_layers=True)  # as PEFT does where it sees a resize
    opened = Adapter.open(AdapterFiles(tmp_path))
    with pytest.raises(UserError) as caught:
        opened.check_against({"model.embed_tokens.weight": (known, width)}, "B")
    assert str(caught.value) == (
        f"{tmp_path}: holds an embedding of {known + 2:,} tokens, its base has {known:,}: the vocabulary was resized; "
        f"in PEFT, call resize_token_embeddings({known + 2}) on the base, put the adapter on it, merge it "
        "(merge_and_unload), and give the merged folder"
    )


def test_other_kinds_of_adapters_are_refused(tmp_path: Path) -> None:
    get_peft_model(ours("gemma-2b"), LoHaConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert refused(tmp_path) == (
        "A/adapter_config.json: a LOHA adapter is not supported: it changes layers otherwise than LoRA does; merge it "
        "with PEFT (merge_and_unload) where it was trained, and give the merged folder"
    )


def test_a_config_that_is_no_json_is_refused(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{")
    assert refused(adapter).startswith("A/adapter_config.json: cannot be read as a PEFT adapter: ")
