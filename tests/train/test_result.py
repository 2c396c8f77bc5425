"""What a run leaves behind opens in stock libraries, with equal logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.chat_template_utils import has_generation_markers, is_chat_template_stop_token_trained

from gemma_ft import load_model, load_tokenizer
from gemma_ft.data.conversation import Turn
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.tokenizer_files import save_tokenizer
from gemma_ft.export.export import ExportOptions, export_model
from gemma_ft.recipe.load import LoadedRecipe, load_recipe
from gemma_ft.train.run_dir import RunDir

TINY = Path(__file__).resolve().parents[2] / "data" / "gemma-tiny"
RecipeFor = Callable[..., LoadedRecipe]
Train = Callable[..., list[dict[str, Any]]]
SUMMARY_KEYS = {
    "steps",
    "tokens",
    "seconds",
    "tokens_per_second",
    "peak_bytes",
    "train_loss",
    "eval_before",
    "eval_after",
    "versions",
}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(8, 88).reshape(2, 40)
    return model.eval()(input_ids=ids).logits.float()


def trained(recipe_for: RecipeFor, train: Train, *overrides: str) -> Path:
    loaded = recipe_for(*overrides, "train.precision=float32")
    train(loaded)
    return Path(loaded.recipe.output_dir)


@pytest.mark.parametrize(
    "extra", [[], ["adapter.dora=true"], ["adapter.rslora=true", "adapter.targets=[q_proj, v_proj]"]]
)
def test_the_adapter_opens_in_stock_peft(
    recipe_for: RecipeFor, train: Train, small_gemma: Path, extra: list[str]
) -> None:
    out = trained(recipe_for, train, "strategy=lora", *extra)
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(small_gemma)
    assert config["target_modules"] == sorted(config["target_modules"])
    base = AutoModelForCausalLM.from_pretrained(small_gemma, dtype=torch.float32)
    plain = logits(base)
    stock = logits(PeftModel.from_pretrained(base, str(out / "adapter")))
    automatic = logits(AutoPeftModelForCausalLM.from_pretrained(str(out / "adapter"), dtype=torch.float32))
    ours = logits(load_model(out, dtype=torch.float32))
    assert (stock - plain).abs().max() > 1e-2  # the adapter does something
    scale = stock.abs().max()
    assert (ours - stock).abs().max() <= 1e-5 * scale
    assert (automatic - stock).abs().max() <= 1e-5 * scale


def test_the_full_model_opens_in_stock_transformers(
    recipe_for: RecipeFor, train: Train, small_gemma: Path, tmp_path: Path
) -> None:
    base = Path(copytree(small_gemma, tmp_path / "base"))
    generation = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": [1, 50]}))
    out = trained(recipe_for, train, "strategy=full", f"model.weights={base}")
    stock = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    assert type(stock).__module__.startswith("transformers.")
    expected = logits(stock)
    assert (logits(load_model(out, dtype=torch.float32)) - expected).abs().max() <= 1e-5 * expected.abs().max()
    tokenizer = load_tokenizer(str(out / "model"))
    stops = [*ChatEncoder(tokenizer).stop_ids, 50]  # and those of its base
    assert stock.config.use_cache is True
    assert json.loads((out / "model" / "generation_config.json").read_text())["eos_token_id"] == stops


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_run_is_loaded_with_quantized_weights(recipe_for: RecipeFor, train: Train, quantize: str) -> None:
    out = trained(recipe_for, train, f"quantize={quantize}")
    exact = logits(load_model(out, dtype=torch.float32))
    rounded = logits(load_model(out / "adapter", dtype=torch.float32, quantize=quantize))
    assert not torch.equal(exact, rounded)
    assert torch.nn.functional.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.8


def test_load_model_takes_a_base_and_an_adapter(recipe_for: RecipeFor, train: Train, small_gemma: Path) -> None:
    out = trained(recipe_for, train, "strategy=lora")
    both = logits(load_model(small_gemma, adapter=out / "adapter", dtype=torch.float32))
    assert torch.equal(both, logits(load_model(out, dtype=torch.float32)))
    assert not torch.equal(both, logits(load_model(small_gemma, dtype=torch.float32)))


def test_fault_23_tokenizer_and_template_travel_with_the_result(recipe_for: RecipeFor, train: Train) -> None:
    out = trained(recipe_for, train, "strategy=lora", "data.system=drop")
    folder = out / "adapter"
    assert (folder / "tokenizer.model").stat().st_size > 0
    contract = json.loads((folder / "gemma_ft.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = ChatEncoder(tokenizer, "drop")
    assert contract["template_sha256"] == encoder.template_hash
    assert contract["stop_ids"] == encoder.stop_ids
    assert contract["system"] == "drop"
    turns = [Turn("system", "Be brief."), Turn("user", "Hi there")]
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert ids == encoder.encode_prompt(turns)


def test_the_summary_has_what_others_rely_on(recipe_for: RecipeFor, train: Train) -> None:
    out = trained(recipe_for, train, "strategy=lora", "eval.generate_rows=3", "eval.max_new_tokens=4")
    summary = json.loads((out / "summary.json").read_text())
    assert summary.keys() >= SUMMARY_KEYS
    for name in ("eval_before", "eval_after"):
        assert summary[name].keys() == {"loss", "exact_match"}
        assert summary[name]["exact_match"] == 0.0
    assert summary["eval_after"]["loss"] < summary["eval_before"]["loss"]
    assert summary["steps"] == 4
    assert summary["tokens"] > 100
    assert len(summary["samples"]) == 3
    assert summary["samples"][0].keys() == {"prompt", "expected", "before", "after"}


def test_the_card_of_a_run_tells_its_sources_and_no_folder_of_this_machine(
    recipe_for: RecipeFor, train: Train, rows: Path, tmp_path: Path
) -> None:
    """Out of the files that a run wrote: recipe.yaml holds each source as a block of its own."""
    mine = tmp_path / "O'Neil, me" / "secret project" / "my rows.jsonl"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(rows.read_bytes())
    sources = json.dumps([str(mine), {"path": str(rows), "repeats": 2.0}])
    out = trained(recipe_for, train, "strategy=lora", f"data.train={sources}", "train.max_steps=1")

    def card(to: str) -> str:
        export_model(str(out), ExportOptions(to="adapter", out=tmp_path / to))
        return (tmp_path / to / "README.md").read_text(encoding="utf-8")

    told = card("one")
    assert "| trained on | `my rows.jsonl, rows.jsonl`: 30 rows, " in told
    assert "| held out | `rows.jsonl` |" in told
    assert "Neil" not in told
    assert "secret project" not in told
    assert "datasets:" not in told
    recipe = load_recipe(out / "recipe.yaml", ["data.train=[{path: owner/name, split: test}, other/set:main]"]).recipe
    RunDir(out).write_recipe(recipe)
    told = card("two")
    assert "\ndatasets:\n- other/set\n- owner/name\n" in told
    assert "| trained on | `owner/name, other/set:main`: 30 rows, " in told


def test_fault_22_no_stray_head_and_no_grown_vocabulary(recipe_for: RecipeFor, train: Train, small_gemma: Path) -> None:
    out = trained(recipe_for, train, "strategy=full")
    before, after = (load_file(str(folder / "model.safetensors")) for folder in (small_gemma, out / "model"))
    assert {name: weight.shape for name, weight in after.items()} == {name: w.shape for name, w in before.items()}
    assert "lm_head.weight" not in after
    assert len(load_tokenizer(out)) == after["model.embed_tokens.weight"].shape[0]


def test_fault_16_full_training_keeps_head_and_embedding_tied(recipe_for: RecipeFor, train: Train) -> None:
    out = trained(recipe_for, train, "strategy=full")
    model = load_model(out, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_folder_with_a_missing_weight_is_refused(small_gemma: Path, tmp_path: Path) -> None:
    from gemma_ft.errors import UserError

    weights = load_file(str(small_gemma / "model.safetensors"))
    del weights["model.layers.3.mlp.up_proj.weight"]
    (tmp_path / "config.json").write_bytes((small_gemma / "config.json").read_bytes())
    save_file(weights, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        load_model(tmp_path)
    assert str(caught.value) == f"{tmp_path}: missing keys in the weights: model.layers.3.mlp.up_proj.weight"


def test_trl_takes_the_saved_template_for_its_assistant_only_loss(tmp_path: Path) -> None:
    """TRL 1.16 refuses one without `{% generation %}`, or whose mask leaves out the end of a turn
    (trainer/sft_trainer.py).
    """
    save_tokenizer(load_tokenizer(TINY), tmp_path, system_policy="fold")
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    assert has_generation_markers(tokenizer.chat_template)
    assert is_chat_template_stop_token_trained(tokenizer, tokenizer.chat_template)
