"""Tokens that a recipe adds: their rows alone are trained, and they survive saving, loading, merging and exporting."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemma_ft import load_model, load_tokenizer
from gemma_ft.adapters.lora import adapter_off
from gemma_ft.adapters.trainable_tokens import INITIAL, TRAINED
from gemma_ft.build.place import place_of
from gemma_ft.cli.app import main
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.errors import UserError
from gemma_ft.export.merge.certificate import certify
from gemma_ft.export.merge.merge import merge_to_folder
from gemma_ft.recipe.load import LoadedRecipe

RecipeFor = Callable[..., LoadedRecipe]
Train = Callable[..., list[dict[str, Any]]]
NAMES = ["<think>", "</think>"]
ADD = "model.added_tokens=['<think>', '</think>']"
EXACT = ["train.precision=float32", "train.learning_rate=0.05", ADD]


@pytest.fixture(scope="module")
def thoughts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("thoughts") / "thoughts.jsonl"
    lines = [{"question": f"What is {n} + 1?", "answer": f"<think>one more</think>{n + 1}"} for n in range(8)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def run(recipe_for: RecipeFor, train: Train, thoughts: Path, *overrides: str) -> Path:
    loaded = recipe_for(f"data.train={thoughts}", f"data.eval={thoughts}", *EXACT, *overrides)
    train(loaded)
    return Path(loaded.recipe.output_dir)


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> torch.Tensor:
    return model.eval()(input_ids=torch.tensor([ids])).logits.float()


def prompt(folder: Path) -> list[int]:
    """Ids of a chat that holds both tokens, by the tokenizer that lies in a folder."""
    tokenizer = load_tokenizer(folder)
    ids = [tokenizer.bos_token_id, *ChatEncoder(tokenizer).content.encode("Go on: <think>two</think> then")]
    assert [tokenizer.convert_ids_to_tokens(one) for one in ids if one >= 2048] == NAMES
    return ids


def test_the_new_rows_alone_are_trained_and_saved_for_stock_peft(
    recipe_for: RecipeFor, train: Train, thoughts: Path, small_gemma: Path
) -> None:
    out = run(recipe_for, train, thoughts, "strategy=lora")
    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    assert saved[TRAINED].shape == (2, 128)
    assert (saved[TRAINED] - saved[INITIAL]).abs().amin(dim=1).min() > 0, "every part of both rows has moved"
    assert sum("embed" in name for name in saved) == 2, "nothing else of the embedding is there"
    table = load_file(small_gemma / "model.safetensors")["model.embed_tokens.weight"]
    plain = load_tokenizer(small_gemma)
    ids = ChatEncoder(plain).content.encode("<think>")
    assert torch.equal(saved[INITIAL][0], table[ids].mean(dim=0))
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["trainable_token_indices"] == {
        "embed_tokens": [2048, 2049]
    }
    asked = prompt(out / "adapter")
    own = load_model(out, dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(small_gemma, dtype=torch.float32)
    stock.resize_token_embeddings(2050, mean_resizing=False)
    stock = PeftModel.from_pretrained(stock, str(out / "adapter"))
    torch.testing.assert_close(logits(own, asked), logits(stock, asked), rtol=1e-4, atol=1e-4)
    with adapter_off(own):
        off = logits(own, asked)
    base = AutoModelForCausalLM.from_pretrained(small_gemma, dtype=torch.float32)
    text = [one for one in asked if one < 2048]
    with adapter_off(own):
        torch.testing.assert_close(logits(own, text)[..., :2048], logits(base, text), rtol=1e-4, atol=1e-4)
    assert (off - logits(own, asked)).abs().max() > 1e-2


@pytest.mark.parametrize("overrides", [["strategy=lora"], ["strategy=qlora", "quantize.kind=nf4"]])
def test_merged_they_are_rows_of_the_embedding(
    recipe_for: RecipeFor, train: Train, thoughts: Path, tmp_path: Path, overrides: list[str]
) -> None:
    out = run(recipe_for, train, thoughts, *overrides)
    merged = tmp_path / "merged"
    facts = merge_to_folder(place_of(out), merged, certify=lambda one, folder: certify(one, folder, prompts=4))
    assert facts.certificate is not None
    assert facts.certificate["passed"]
    asked = prompt(merged)
    stock = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert stock.config.vocab_size == len(AutoTokenizer.from_pretrained(merged)) == 2050
    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    assert torch.equal(stock.get_input_embeddings().weight[2048:], saved[TRAINED])
    torch.testing.assert_close(logits(load_model(merged, dtype=torch.float32), asked), logits(stock, asked),
                               rtol=1e-4, atol=1e-4)  # fmt: skip
    if "strategy=lora" in overrides:
        live = load_model(out, dtype=torch.float32)
        torch.testing.assert_close(logits(live, asked), logits(stock, asked), rtol=1e-4, atol=1e-4)


def test_a_fully_trained_model_has_them_in_its_embedding(
    recipe_for: RecipeFor, train: Train, thoughts: Path, small_gemma: Path
) -> None:
    out = run(recipe_for, train, thoughts, "strategy=full", "train.learning_rate=0.001")
    asked = prompt(out / "model")
    stock = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    assert stock.config.vocab_size == stock.get_input_embeddings().weight.shape[0] == 2050
    assert stock.lm_head.weight is stock.get_input_embeddings().weight
    own = load_model(out, dtype=torch.float32)
    torch.testing.assert_close(logits(own, asked), logits(stock, asked), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_base_and_merge_are_measured_beside_it(
    recipe_for: RecipeFor, train: Train, thoughts: Path, tmp_path: Path, strategy: str
) -> None:
    """The base has rows for the tokens as they began; a merge is that of this run."""
    out = run(recipe_for, train, thoughts, f"strategy={strategy}", "train.learning_rate=0.001", "eval.generate_rows=2",
              "eval.max_new_tokens=4")  # fmt: skip
    words = ["eval", str(out), "--rows", "2", "--out", str(tmp_path / "eval.json")]
    if strategy == "lora":
        merge_to_folder(place_of(out), tmp_path / "merged")
        words += ["--merged", str(tmp_path / "merged")]
    assert main(words) == 0
    models = json.loads((tmp_path / "eval.json").read_text())["models"]
    losses = {name: one["loss"]["value"] for name, one in models.items()}
    assert all(loss > 0 for loss in losses.values())
    assert len(losses) == len(models) >= 2


def test_a_resumed_run_goes_on_with_its_rows(recipe_for: RecipeFor, train: Train, thoughts: Path) -> None:
    words = ["strategy=lora", "checkpoint.every_steps=2", f"data.train={thoughts}", f"data.eval={thoughts}", *EXACT]
    whole = recipe_for(*words, "train.schedule=constant", "train.warmup_ratio=0", out="whole")
    train(whole)
    half = recipe_for(*words, "train.schedule=constant", "train.warmup_ratio=0", "train.max_steps=2", out="half")
    train(half)
    train(recipe_for(*words, "train.schedule=constant", "train.warmup_ratio=0", out="half"), resume=True)
    one, other = (
        load_file(Path(one.recipe.output_dir) / "adapter" / "adapter_model.safetensors") for one in (whole, half)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("names", "why"),
    [
        ("['<bos>']", "'<bos>' is a token already; take it out"),
        (
            "['ok<end_of_turn>']",
            "'ok<end_of_turn>' holds <end_of_turn>, which other libraries would find in it; choose another name",
        ),
        ("['<a>', '<a>']", "'<a>' is a token already; take it out"),
        ("['a b']", "'a b' holds blanks; a token is found in a text by its exact characters, so write it without"),
        ('["a\\0b"]', "'a\\x00b' holds a NUL character; is the file damaged, or not UTF-8?"),
    ],
)
def test_what_is_no_token_is_refused(recipe_for: RecipeFor, train: Train, names: str, why: str) -> None:
    with pytest.raises(UserError) as caught:
        train(recipe_for("strategy=lora", f"model.added_tokens={names}"))
    assert str(caught.value) == f"model.added_tokens: {why}"


def test_a_base_with_spare_rows_is_refused(
    recipe_for: RecipeFor, train: Train, small_gemma: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(small_gemma)
    model.resize_token_embeddings(2064, mean_resizing=False)
    model.save_pretrained(tmp_path / "spare")
    with pytest.raises(UserError, match="has 2064 rows for a tokenizer of 2048 tokens"):
        train(recipe_for("strategy=lora", ADD, f"model.weights={tmp_path / 'spare'}", f"model.tokenizer={small_gemma}"))
