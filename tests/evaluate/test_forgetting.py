"""The canary: what is scored, that the base is the base, and that training cannot tell it was scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_ft.adapters.lora import adapter_off, add_adapter
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.tokenizer import load_tokenizer
from gemma_ft.errors import DataError
from gemma_ft.evaluate.forgetting import ROWS, TOKENS, build_forgetting_set, forgetting_losses, forgetting_note
from gemma_ft.evaluate.held_out import held_out_loss
from gemma_ft.families.records import PRESETS
from gemma_ft.model.gemma import GemmaForCausalLM

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(load_tokenizer(str(ROOT / "data" / "gemma-tiny")))


def amplified(encoder: ChatEncoder, *, dora: bool = False) -> Any:
    """A tiny Gemma with amplified weights and an adapter that changes what it says, with dropout."""
    torch.manual_seed(7)
    model = GemmaForCausalLM(PRESETS["gemma-tiny"].config(vocab_size=len(encoder.tokenizer)))
    shape = {"rank": 4, "alpha": 8.0, "dropout": 0.1, "targets": "all-linear", "rslora": False, "dora": dora}
    model = add_adapter(model, **shape, init="default", base="x/y", revision=None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" not in name:
                parameter.normal_(0, 0.3 if "norm" in name else 1.5 / parameter.shape[-1] ** 0.5)
    return model.train()


def test_what_ships_is_short_varied_and_scored_whole(encoder: ChatEncoder) -> None:
    rows = [json.loads(line) for line in (ROOT / "data" / "canary.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == ROWS
    questions = [row["messages"][0]["content"] for row in rows]
    assert len(set(questions)) == ROWS
    for kind in ("capital of France", "17 plus 25", "Python function", "Wie heißt", "日本"):
        assert any(kind in question for question in questions), kind
    canary = build_forgetting_set("data/canary.jsonl", encoder, batch_size=8)
    assert canary.rows == ROWS
    assert [len(batch["input_ids"]) for batch in canary.batches] == [8, 8, 8, 8]
    # not one answer is cut: each row ends in <end_of_turn>, within TOKENS
    ends = sum(int((batch["labels"] == encoder.control.end_of_turn).sum()) for batch in canary.batches)
    assert ends == ROWS
    assert max(batch["input_ids"].shape[1] for batch in canary.batches) <= TOKENS


def test_only_so_many_rows_and_tokens_are_taken(encoder: ChatEncoder, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Say {n}.", "completion": "a " * 500}) + "\n" for n in range(99)))
    canary = build_forgetting_set(str(path), encoder, batch_size=5)
    assert canary.rows == ROWS
    assert {batch["input_ids"].shape[1] for batch in canary.batches} == {TOKENS}
    other = build_forgetting_set(str(path), encoder, batch_size=32)
    assert other.sha256 == canary.sha256 != build_forgetting_set("data/canary.jsonl", encoder, batch_size=5).sha256


def test_rows_that_cannot_be_scored_are_told(encoder: ChatEncoder, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"prompt": "word " * 200, "completion": "Yes."}) + "\n")
    with pytest.raises(DataError) as caught:
        build_forgetting_set(str(path), encoder, batch_size=5)
    assert str(caught.value) == (
        f"eval.canary: {path}: no answer begins within the first 128 tokens of its first 32 rows; give shorter rows, "
        "or eval.canary=null"
    )
    with pytest.raises(DataError) as caught:
        build_forgetting_set("nowhere.jsonl", encoder, batch_size=5)
    assert str(caught.value).startswith("nowhere.jsonl: no such file")


@pytest.mark.parametrize("dora", [False, True])
def test_the_base_is_the_model_without_its_adapter(encoder: ChatEncoder, dora: bool) -> None:
    model, canary = amplified(encoder, dora=dora), build_forgetting_set("data/canary.jsonl", encoder, batch_size=16)
    figures = forgetting_losses(model, canary)
    base = model.unload()  # takes the adapter's layers away for good
    assert figures["canary_base_loss"] == held_out_loss(base, canary.batches)
    assert figures["canary_loss"] != figures["canary_base_loss"]
    assert figures["forgetting"] == figures["canary_loss"] - figures["canary_base_loss"]


def test_without_an_adapter_the_base_is_what_was_known_before(encoder: ChatEncoder) -> None:
    base, canary = amplified(encoder).unload(), build_forgetting_set("data/canary.jsonl", encoder, batch_size=16)
    loss = held_out_loss(base, canary.batches)
    assert loss is not None
    known = forgetting_losses(base, canary, base_loss=1.5)
    assert known == {"canary_loss": loss, "canary_base_loss": 1.5, "forgetting": loss - 1.5}
    assert forgetting_losses(base, canary) == {"canary_loss": loss, "canary_base_loss": None, "forgetting": None}


@pytest.mark.parametrize("dora", [False, True])
def test_scoring_leaves_flags_modes_and_gradients_as_they_were(encoder: ChatEncoder, dora: bool) -> None:
    """A frozen weight of the adapter stays frozen, a trained one trained; dropout draws the same; gradients are the
    same, bit for bit.
    """
    model, canary = amplified(encoder, dora=dora), build_forgetting_set("data/canary.jsonl", encoder, batch_size=16)
    frozen = [name for name, _ in model.named_parameters() if "layers.1" in name and "lora_A" in name]
    assert frozen
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in frozen)

    def state() -> tuple[Any, Any]:
        return [p.requires_grad for p in model.parameters()], [module.training for module in model.modules()]

    def gradients() -> dict[str, torch.Tensor]:
        torch.manual_seed(1)  # dropout
        model.zero_grad()
        model(**canary.batches[0], use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    before, first = state(), gradients()
    forgetting_losses(model, canary)
    with pytest.raises(RuntimeError), adapter_off(model):
        raise RuntimeError
    assert state() == before
    second = gradients()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("forgetting", "gain", "warns"),
    [
        (None, 2.0, False),
        (-0.5, 2.0, False),
        (0.1, 0.0, False),  # nobody can tell so little from chance
        (0.11, 0.0, True),
        (0.11, None, True),
        (0.11, -1.0, True),  # nothing was gained
        (0.99, 2.0, False),
        (1.01, 2.0, True),
    ],
)
def test_much_forgetting_is_told(forgetting: float | None, gain: float | None, warns: bool) -> None:
    assert (forgetting_note(forgetting, gain) is not None) == warns


def test_the_warning_says_what_to_do() -> None:
    assert forgetting_note(1.234, 2.0) == (
        "forgetting: the canary loss rose by 1.23 while the held-out loss fell by 2.00; lower train.learning_rate or "
        "train.epochs, or mix general rows into data.train"
    )
