"""A Gemma 3 whose tokenizer has a token that its embedding has no row for: trained, grown and asked as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gemma_ft import load_model, load_tokenizer
from gemma_ft.adapters.trainable_tokens import TRAINED
from gemma_ft.build.new_tokens import tokens_beyond
from gemma_ft.build.place import place_of
from gemma_ft.data.conversation import Turn
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.tokenizer import add_tokens
from gemma_ft.errors import UserError
from gemma_ft.export.merge.certificate import certify
from gemma_ft.export.merge.merge import merge_to_folder
from gemma_ft.families.records import GEMMA_3, PRESETS
from gemma_ft.infer.session import open_session
from gemma_ft.recipe.load import LoadedRecipe
from tests.gemma3 import preset_of, tiny_gemma3

RecipeFor = Callable[..., LoadedRecipe]
Train = Callable[..., list[dict[str, Any]]]
ROWS = 2050  # of the embedding; <image_soft_token> is 2050


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gemma3(tmp_path_factory.mktemp("gemma3") / "base")


@pytest.fixture(autouse=True)
def _preset(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "gemma-tiny", preset_of(base))


def test_its_chats_are_those_of_its_template_and_no_picture_can_be_typed(base: Path) -> None:
    encoder = ChatEncoder(load_tokenizer(base))
    assert encoder.chat == GEMMA_3.chat
    parts: list[Any] = [{"type": "text", "text": " a\n"}, {"type": "text", "text": "b <image_soft_token>"}]
    turns = [Turn("user", encoder.chat.joined([part["text"] for part in parts]))]
    ids = encoder.encode_prompt(turns)
    assert max(ids) < 2048
    plain = [{"type": "text", "text": "Say "}, {"type": "text", "text": "it."}]
    written = encoder.tokenizer.apply_chat_template([{"role": "user", "content": plain}], add_generation_prompt=True)
    assert written["input_ids"] == encoder.encode_prompt([Turn("user", "Sayit.")])


@pytest.mark.parametrize("overrides", [[], ["strategy=full", "~quantize", "~adapter"]], ids=["nf4", "full"])
def test_nothing_grows_its_embedding(recipe_for: RecipeFor, train: Train, base: Path, overrides: list[str]) -> None:
    loaded = recipe_for(f"model.weights={base}", "train.max_steps=2", *overrides)
    train(loaded)
    out = Path(loaded.recipe.output_dir)
    if overrides:
        assert json.loads((out / "model" / "config.json").read_text())["vocab_size"] == ROWS
        assert load_file(out / "model" / "model.safetensors")["model.embed_tokens.weight"].shape[0] == ROWS
    else:
        assert not any("embed" in name for name in load_file(out / "adapter" / "adapter_model.safetensors"))
    session = open_session(out)
    assert len(session.tokenizer) == ROWS + 1
    assert list(session.stream(session.chat_ids([Turn("user", "<image_soft_token>")]), max_new_tokens=3))


def test_added_tokens_stand_behind_the_picture_in_adapter_merge_and_stock_peft(
    recipe_for: RecipeFor, train: Train, base: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{n}?", "answer": f"<think>x{n}"}) + "\n" for n in range(8)))
    loaded = recipe_for(f"model.weights={base}", "strategy=lora", "~quantize", "model.added_tokens=['<think>']",
                        "train.precision=float32", "train.max_steps=2", f"data.train={rows}",
                        f"data.eval={rows}")  # fmt: skip
    train(loaded)
    out = Path(loaded.recipe.output_dir)
    said = json.loads((out / "adapter" / "adapter_config.json").read_text())["trainable_token_indices"]
    assert said == {"embed_tokens": [ROWS, ROWS + 1]}
    ids = torch.tensor([[2, *ChatEncoder(load_tokenizer(out / "adapter")).content.encode("so <think> on")]])
    assert ROWS + 1 in ids
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    stock.resize_token_embeddings(ROWS + 2, mean_resizing=False)
    stock = PeftModel.from_pretrained(stock, str(out / "adapter")).eval()
    facts = merge_to_folder(place_of(out), tmp_path / "merged", certify=lambda one, at: certify(one, at, prompts=2))
    assert facts.certificate is not None
    assert facts.certificate["passed"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    saved = load_file(out / "adapter" / "adapter_model.safetensors")[TRAINED]
    assert torch.equal(merged.get_input_embeddings().weight[ROWS:], saved)
    with torch.no_grad():
        wanted = stock(input_ids=ids).logits
        for model in (
            load_model(out, dtype=torch.float32),
            merged,
            load_model(tmp_path / "merged", dtype=torch.float32),
        ):
            torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_token_that_a_text_becomes_needs_a_row(
    recipe_for: RecipeFor, train: Train, base: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(base)
    assert tokens_beyond(tokenizer, ROWS) == []
    add_tokens(tokenizer, ["<think>"])
    assert tokens_beyond(tokenizer, ROWS) == ["<think>"]
    folder = tmp_path / "grown"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(str(folder))
    with pytest.raises(UserError) as caught:
        open_session(folder)
    assert str(caught.value) == (
        f"{folder}: its tokenizer gives '<think>' the id 2051, but the embedding ends before 2050; the tokenizer is "
        "another model's, or its tokens were added and their rows never trained"
    )
    with pytest.raises(UserError) as caught:
        train(recipe_for(f"model.weights={folder}", "strategy=lora", "~quantize"))
    assert str(caught.value) == "model.tokenizer: has 2052 tokens, the model 2050; use the model's own"


def test_rows_that_no_token_has_are_never_said(tmp_path: Path) -> None:
    """As from 4B on."""
    session = open_session(tiny_gemma3(tmp_path / "spare", spare_rows=500), dtype=torch.float32)
    assert session.engine.known_tokens == len(session.tokenizer) == 2051
    assert len(session.model.get_input_embeddings().weight) == 2551
