"""A merged folder: the weights PEFT would give, every other byte the base's own, complete for stock libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemma_ft import load_model
from gemma_ft.build.contract import Contract
from gemma_ft.build.located import Source
from gemma_ft.build.place import BaseFiles, place_of
from gemma_ft.build.pretrained import load_base
from gemma_ft.build.weights import WeightFiles
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.export.merge.dequantize import Stored, quantize_dequantize, quantized_names
from gemma_ft.export.merge.merge import merge_to_folder
from gemma_ft.export.merge.merged import merged_weights
from gemma_ft.families.chat_template import TURNS
from tests.export.tuned import linear_names, names_in, same_bytes, save_tuned, tensors
from tests.parity.amplified import SECOND, relative

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, r"layers\.1\..*up_proj": 3}, "alpha_pattern": {"layers.0.*v_proj": 5}},
    "few targets": {"target_modules": ["q_proj", "down_proj"]},
    "norms as a whole": {"modules_to_save": ["norm"]},
    "embedding as a whole": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "rows of tokens": {"trainable_token_indices": [3, 40, 12]},
    "rows of tokens, both ends named": {"trainable_token_indices": {"embed_tokens": [7], "lm_head": [7]}},
    "rows of tokens and a norm": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": [5],
        "modules_to_save": ["norm"],
    },
    "a setting that linear layers ignore": {"fan_in_fan_out": True},
}
FILES = ["chat_template.jinja", "config.json", "gemma_ft.json", "generation_config.json", "merge.json",
         "model.safetensors", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]  # fmt: skip


def native(base: Path, dtype: torch.dtype) -> Any:
    return load_base(Source(str(base), None), dtype=dtype)


def peft_merged(base: Path, adapter: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of PEFT's own merge, in `dtype` throughout."""
    wrapped = PeftModel.from_pretrained(native(base, dtype), str(adapter), autocast_adapter_dtype=False)
    state = wrapped.to(dtype).merge_and_unload().state_dict()
    return {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_is_that_of_peft(kind: str, base: Path, first_base: Path, tmp_path: Path) -> None:
    for one, dtype, within in ((base, torch.float32, 1e-6), (first_base, torch.float64, 1e-10)):
        adapter = save_tuned(tmp_path / f"adapter-{dtype}", one, native(one, dtype), **KINDS[kind])
        facts = merge_to_folder(place_of(adapter), tmp_path / f"merged-{dtype}")
        found, expected, before = tensors(tmp_path / f"merged-{dtype}"), peft_merged(one, adapter, dtype), tensors(one)
        assert found.keys() == expected.keys() == before.keys()
        off = {name: relative(found[name], expected[name]) for name in expected}
        assert max(off.values()) <= within, {name: value for name, value in off.items() if value > within}
        changed = {name for name in before if not torch.equal(before[name], expected[name])}
        assert {name for name in before if not same_bytes(found[name], before[name])} == changed
        assert facts.changed == len(changed) > 0
        assert facts.tensors == len(before)


TIED: dict[str, dict[str, Any]] = {
    "one": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "among others": {
        "target_modules": ["q_proj", "lm_head", "embed_tokens"], "ensure_weight_tying": True, "use_rslora": True,
    },
    "with ranks of their own": {
        "target_modules": ["v_proj", "embed_tokens"], "ensure_weight_tying": True,
        "rank_pattern": {"embed_tokens": 2, "lm_head": 2}, "alpha_pattern": {"embed_tokens": 3, "lm_head": 3},
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TIED)
def test_lora_on_the_tied_embedding_is_merged_once(kind: str, base: Path, tmp_path: Path) -> None:
    """The adapter as it is applied is the measure: peft 0.21.2's own merge adds it to the shared tensor twice, once for
    each end of the model.
    """
    adapter = save_tuned(tmp_path / "adapter", base, native(base, torch.float32), **TIED[kind])
    merge_to_folder(place_of(adapter), tmp_path / "merged")
    ids = torch.arange(8, 40)[None]
    live = load_model(adapter, dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        expected, found = live(ids).logits, stock(ids).logits
    assert relative(found, expected) <= 1e-5
    assert relative(native(base, torch.float32).eval()(ids).logits, expected) > 1e-2


def test_an_adapter_of_rows_alone_is_merged(base: Path, tmp_path: Path) -> None:
    """PEFT's type TRAINABLE_TOKENS, which saves the rows for both ends of the model."""
    wrapped = get_peft_model(native(base, torch.float32), TrainableTokensConfig(token_indices=[9, 4]))
    with torch.no_grad():
        for weight in wrapped.parameters():
            if weight.requires_grad:
                weight.add_(torch.ones_like(weight))
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(tmp_path / "adapter")
    facts = merge_to_folder(place_of(tmp_path / "adapter"), tmp_path / "merged")
    assert (facts.changed, facts.adapters[0]["kind"], facts.adapters[0]["rank"]) == (1, "token_rows", None)
    before, after = (
        tensors(base)["model.embed_tokens.weight"],
        tensors(tmp_path / "merged")["model.embed_tokens.weight"],
    )
    torch.testing.assert_close(after[[4, 9]], before[[4, 9]] + 1)
    others = [row for row in range(len(before)) if row not in (4, 9)]
    assert torch.equal(after[others], before[others])


def test_fault_26_untouched_tensors_keep_their_bytes_and_dtype(base_bf16: Path, tmp_path: Path) -> None:
    adapter = save_tuned(tmp_path / "adapter", base_bf16, native(base_bf16, torch.float32))
    merge_to_folder(place_of(adapter), tmp_path / "merged")
    before, after = tensors(base_bf16), tensors(tmp_path / "merged")
    assert {name for name in before if not same_bytes(before[name], after[name])} == linear_names(SECOND)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    exact = peft_merged(base_bf16, adapter, torch.float32)
    assert all(torch.equal(after[name], exact[name].bfloat16()) for name in before)  # one cast, at the end


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dtype_holds_for_every_tensor_and_the_config(dtype: torch.dtype, base_bf16: Path, tmp_path: Path) -> None:
    adapter = save_tuned(tmp_path / "adapter", base_bf16, native(base_bf16, torch.float32))
    merge_to_folder(place_of(adapter), tmp_path / "merged", dtype=dtype)
    assert {tensor.dtype for tensor in tensors(tmp_path / "merged").values()} == {dtype}
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    norm = "model.norm.weight"
    assert torch.equal(tensors(tmp_path / "merged")[norm].float(), tensors(base_bf16)[norm].float())


def test_the_folder_is_complete_for_stock_libraries(base: Path, tmp_path: Path) -> None:
    adapter = save_tuned(tmp_path / "adapter", base, native(base, torch.float32), quantize="nf4")
    out = tmp_path / "merged"
    facts = merge_to_folder(place_of(adapter), out)
    assert names_in(tmp_path) == ["adapter", "merged"]
    assert names_in(out) == FILES
    stock, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(stock).__module__.startswith("transformers.models.gemma2")
    ids = torch.arange(8, 40)[None]
    assert relative(stock.eval()(ids).logits, load_model(adapter, dtype=torch.float32)(ids).logits) <= 1e-5
    tokenizer, contract = AutoTokenizer.from_pretrained(out), Contract.read(out)
    assert tokenizer.chat_template == TURNS.text("drop")
    assert contract is not None
    assert (contract.quantize, contract.system, contract.base) == (None, "drop", str(base))
    generation = json.loads((out / "generation_config.json").read_text())
    control = contract.encoder(tokenizer, out).control
    assert [generation[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [
        control.bos, [control.eos, control.end_of_turn], control.pad,
    ]  # fmt: skip
    assert json.loads((out / "merge.json").read_text()) == facts.said()
    assert facts.sha256 == WeightFiles.open(out).fingerprint()
    assert facts.base == {"name": str(base), "revision": None, "sha256": WeightFiles.open(base).fingerprint()}


def test_shards_and_their_index_hold_the_same_tensors(base_bf16: Path, tmp_path: Path) -> None:
    adapter = save_tuned(tmp_path / "adapter", base_bf16, native(base_bf16, torch.float32))
    whole = merge_to_folder(place_of(adapter), tmp_path / "whole")
    cut = merge_to_folder(place_of(adapter), tmp_path / "cut", max_shard_bytes=300_000)
    assert whole.sha256 == cut.sha256
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == cut.bytes
    AutoModelForCausalLM.from_pretrained(tmp_path / "cut")


def test_fault_16_the_tied_head_is_written_once(base: Path, tmp_path: Path) -> None:
    """A base that carries a copy of the embedding as lm_head.weight loses it."""
    double = tmp_path / "double"
    double.mkdir()
    for path in base.iterdir():
        (double / path.name).write_bytes(path.read_bytes())
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, double / "model.safetensors", metadata={"format": "pt"})
    adapter = save_tuned(tmp_path / "adapter", double, native(base, torch.float32))
    merge_to_folder(place_of(adapter), tmp_path / "merged")
    assert tensors(tmp_path / "merged").keys() == tensors(base).keys()
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is True


def test_several_adapters_are_added_up_with_their_weights(base: Path, tmp_path: Path) -> None:
    one = save_tuned(tmp_path / "one", base, native(base, torch.float32))
    two = save_tuned(tmp_path / "two", base, native(base, torch.float32), seed=1, r=3, target_modules=["q_proj"])
    place, shares = place_of(one), {"one": 0.25, "two": -1.5}
    merge_to_folder(place, tmp_path / "merged", adapters=[(one, 0.25), (two, -1.5)])
    wrapped = PeftModel.from_pretrained(native(base, torch.float32), str(one), adapter_name="one")
    wrapped.load_adapter(str(two), adapter_name="two")
    wrapped.add_weighted_adapter(list(shares), list(shares.values()), "both", combination_type="cat")
    wrapped.set_adapter("both")
    expected = wrapped.merge_and_unload().state_dict()
    found = tensors(tmp_path / "merged")
    assert max(relative(found[name], expected[name]) for name in found) <= 1e-6
    merge_to_folder(place, tmp_path / "half", adapters=[(one, 0.5)])
    half, before = tensors(tmp_path / "half"), tensors(base)
    full = peft_merged(base, one, torch.float32)
    assert max(relative(half[name], (before[name] + full[name]) / 2) for name in half) <= 1e-6


def test_stock_adapters_merge_with_the_tokenizer_of_their_base(base: Path, tmp_path: Path) -> None:
    """No contract, no tokenizer beside it: the base's own, with its template, and nothing that was not agreed on."""
    adapter = save_tuned(tmp_path / "adapter", base, native(base, torch.float32), contract=False)
    merge_to_folder(place_of(adapter), tmp_path / "merged")
    assert names_in(tmp_path / "merged") == [name for name in FILES if name != "gemma_ft.json"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    generation = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == ChatEncoder(tokenizer).stop_ids


STORED = [
    Stored("nf4", True, torch.float32),
    Stored("nf4", False, torch.float32),
    Stored("nf4", True, torch.bfloat16),
    Stored("int8", True, torch.float32),
]


@pytest.mark.parametrize("stored", STORED, ids=lambda one: f"{one.kind}-{one.double_quant}-{one.dtype}")
def test_dequantized_weights_are_those_of_the_quantized_layers(stored: Stored, base: Path) -> None:
    """Bit for bit, for every layer that transformers replaced and no other."""
    from peft.utils.integrations import dequantize_module_weight

    source = Source(str(base), None)
    model = load_base(source, dtype=stored.dtype, quantize=stored.kind, double_quant=stored.double_quant)
    layers = {f"{name}.weight": one for name, one in model.named_modules() if "bit" in type(one).__name__.lower()}
    assert layers.keys() == quantized_names(BaseFiles(source).empty_model) == linear_names(SECOND)
    for name, layer in layers.items():
        if stored.kind == "int8" and layer.state.SCB is None:
            layer.state.SCB = layer.weight.SCB
        expected = dequantize_module_weight(layer).data
        assert same_bytes(quantize_dequantize(tensors(base)[name], stored), expected), name


def test_the_dequantized_policy_changes_all_that_was_quantized(base_bf16: Path, tmp_path: Path) -> None:
    model = native(base_bf16, torch.float32)
    adapter = save_tuned(tmp_path / "adapter", base_bf16, model, quantize="nf4", target_modules=["q_proj"])
    facts = merge_to_folder(place_of(adapter), tmp_path / "merged", policy="dequantized", dtype=torch.float32)
    before, after = tensors(base_bf16), tensors(tmp_path / "merged")
    changed = {name for name in before if not torch.equal(before[name].float(), after[name])}
    assert changed == linear_names(SECOND)
    assert (facts.changed, facts.policy, facts.quantize) == (len(changed), "dequantized", "nf4")
    stored = Stored("nf4", True, torch.bfloat16)  # no recipe tells the precision: that of the files
    original = tensors_of(adapter, "original")
    for name in changed:
        there = quantize_dequantize(before[name], stored).float()
        assert relative(after[name] - there, original[name] - before[name].float()) <= 1e-5 if "q_proj" in name else (
            torch.equal(after[name], there)
        )  # fmt: skip


def tensors_of(adapter: Path, policy: Any) -> dict[str, Tensor]:
    merged = merged_weights(place_of(adapter), policy=policy, dtype=torch.float32)
    return {name: merged.tensor(name) for name in merged.infos}
