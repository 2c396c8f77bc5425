"""A Gemma that gives a number: read at the last token of each answer by its position, whatever stands around it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from gemma_ft.errors import UserError
from gemma_ft.families.records import FAMILIES
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.model.reward import (
    Gemma2ForSequenceClassification,
    GemmaForSequenceClassification,
    last_places,
)
from tests.parity.amplified import (
    FIRST,
    ONE_OF_EACH,
    SECOND,
    THIRD,
    TOKENS,
    VAULT,
    amplify,
    relative,
    tiny_config,
    token_rows,
)
from tests.parity.amplified import ours as language_model

SHAPES = pytest.mark.parametrize("shape", ONE_OF_EACH)
STOCK = pytest.mark.parametrize("shape", [FIRST, SECOND, THIRD])  # transformers has no such class of a VaultGemma
PAD = 0


def ours(shape: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> GemmaForSequenceClassification:
    """A tiny reward model, amplified, its head too."""
    model = GemmaForSequenceClassification(tiny_config(shape, **overrides))
    amplify(model)
    return model.to(dtype).eval()


def rewards(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).logits[:, 0]
    return found


def alone(model: Any, rows: list[list[int]]) -> Tensor:
    """The reward of each sequence by itself: what every batch has to give."""
    return torch.cat([rewards(model, input_ids=torch.tensor([row])) for row in rows])


def rows_of_lengths(*lengths: int) -> list[list[int]]:
    return [token_rows(1, length, seed=length)[0].tolist() for length in lengths]


def padded(rows: list[list[int]], side: str, pad: int = PAD) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    space = [[pad] * (longest - len(row)) for row in rows]
    ids = [row + gap if side == "right" else gap + row for row, gap in zip(rows, space, strict=True)]
    real = [[1] * len(row) for row in rows]
    zero = [[0] * len(gap) for gap in space]
    mask = [one + gap if side == "right" else gap + one for one, gap in zip(real, zero, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@SHAPES
def test_a_fresh_head_is_zero_and_so_is_every_reward(shape: str) -> None:
    model = GemmaForSequenceClassification(tiny_config(shape)).eval()
    assert model.score.weight.shape == (1, model.config.hidden_size)
    assert rewards(model, input_ids=token_rows()).tolist() == [0.0, 0.0]


@SHAPES
def test_the_classes_have_transformers_names(shape: str) -> None:
    model, family = ours(shape), FAMILIES[tiny_config(shape).model_type]
    assert model.config.num_labels == 1
    if family.classifier is not None:
        assert type(model).__name__ == family.classifier
        assert hasattr(transformers, family.classifier)
    else:
        assert shape == VAULT
        assert not hasattr(transformers, type(model).__name__)
    with pytest.raises(UserError) as refused:
        Gemma2ForSequenceClassification(tiny_config(FIRST))
    assert str(refused.value) == (
        "config.json: a GemmaForSequenceClassification, not a Gemma2ForSequenceClassification; use "
        "GemmaForSequenceClassification for any Gemma"
    )


@pytest.mark.parametrize("side", ["left", "right"])
@SHAPES
def test_p15_padding_at_either_side_changes_no_reward(shape: str, side: str) -> None:
    model, rows = ours(shape, torch.float64), rows_of_lengths(5, TOKENS, 11)
    assert relative(rewards(model, **padded(rows, side)), alone(model, rows)) <= 1e-10


@pytest.mark.parametrize("side", ["left", "right"])
@SHAPES
def test_p16_no_pad_id_is_asked_for(shape: str, side: str) -> None:
    """Unset, or the id of a token that stands in the text and at its end: the place is found without it."""
    rows = rows_of_lengths(5, TOKENS, 11)
    expected = alone(ours(shape, torch.float64), rows)
    for pad in (None, rows[0][-1]):
        model = ours(shape, torch.float64, pad_token_id=pad)
        assert relative(rewards(model, **padded(rows, side, rows[0][-1])), expected) <= 1e-10


@SHAPES
def test_packed_answers_have_the_rewards_that_they_have_alone(shape: str) -> None:
    """Two documents in a sequence, a third beside them; of each only the tokens of its answer are numbered, and what
    stands behind the last of these is not seen.
    """
    model, rows = ours(shape, torch.float64), rows_of_lengths(9, 12, 15)
    tails = [[*row, 7, 8] for row in rows]
    ids = torch.tensor([tails[0] + tails[1], tails[2] + [PAD] * 8])
    documents = torch.tensor([[0] * 11 + [1] * 14, [0] * 17 + [-1] * 8])
    positions = torch.tensor([[*range(11), *range(14)], [*range(17), *[0] * 8]])
    numbers = torch.full(ids.shape, -1)
    numbers[0, 5:9], numbers[0, 15:23], numbers[1, 3:15] = 2, 0, 1
    found = rewards(model, input_ids=ids, document_ids=documents, position_ids=positions, answer_ids=numbers)
    expected = alone(model, rows)
    assert relative(found, expected[[1, 2, 0]]) <= 1e-10


def test_the_last_place_is_that_of_the_last_numbered_token() -> None:
    """An answer of several turns: the question between them is not numbered."""
    numbers = torch.tensor([[-1, 0, 0, -1, 0, -1], [1, -1, -1, 2, 2, -1]])
    assert last_places(numbers).tolist() == [4, 6, 10]
    assert last_places(torch.full((2, 3), -1)).tolist() == []
    with pytest.raises(AssertionError):
        last_places(torch.tensor([[0, 2]]))


def test_a_micro_batch_without_an_answer_gives_no_reward_and_a_gradient_of_zero() -> None:
    model, ids = ours(SECOND), token_rows()
    found = model(input_ids=ids, answer_ids=torch.full(ids.shape, -1)).logits
    assert found.shape == (0, 1)
    found.sum().backward()
    assert float(model.score.weight.grad.abs().max()) == 0.0


@SHAPES
def test_the_gradient_of_the_head_is_the_hidden_state_of_the_last_token(shape: str) -> None:
    model, ids = ours(shape, torch.float64), token_rows(1)
    model(input_ids=ids).logits.sum().backward()
    with torch.no_grad():
        state = model.model(ids, use_cache=False).last_hidden_state[0, -1]
    assert relative(model.score.weight.grad[0], state) <= 1e-12


def test_the_head_is_float32_whatever_the_dtype(tmp_path: Path) -> None:
    ours(SECOND).save_pretrained(tmp_path / "reward")
    language_model(SECOND).save_pretrained(tmp_path / "language")
    for name in ("reward", "language"):
        model = GemmaForSequenceClassification.from_pretrained(tmp_path / name, dtype=torch.bfloat16)
        assert (model.dtype, model.score.weight.dtype) == (torch.bfloat16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = GemmaForSequenceClassification.from_pretrained(tmp_path / "reward")(token_rows()).logits
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())


@pytest.mark.parametrize("side", ["left", "right"])
@STOCK
def test_transformers_gives_our_rewards_from_our_folder(shape: str, side: str, tmp_path: Path) -> None:
    model, rows = ours(shape), rows_of_lengths(5, TOKENS, 11)
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert (said["architectures"], said["pad_token_id"]) == ([FAMILIES[said["model_type"]].classifier], PAD)
    stock, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert type(stock).__module__.startswith("transformers.")
    assert not any(info.values()), info
    assert relative(rewards(stock.eval(), **padded(rows, side)), alone(model, rows)) <= 1e-5


@STOCK
def test_we_open_what_transformers_saves(shape: str, tmp_path: Path) -> None:
    stock = getattr(transformers, FAMILIES[tiny_config(shape).model_type].classifier or "")(
        tiny_config(shape, attn_implementation="eager", num_labels=1)
    )
    amplify(stock)
    stock.save_pretrained(tmp_path)
    model = GemmaForSequenceClassification.from_pretrained(tmp_path)
    assert relative(rewards(model, input_ids=token_rows()), rewards(stock.eval(), input_ids=token_rows())) <= 1e-5


def test_a_language_model_gives_all_but_the_head(tmp_path: Path) -> None:
    base = language_model(THIRD)
    base.save_pretrained(tmp_path)
    model, info = GemmaForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"score.weight"}
    assert not model.score.weight.any()
    assert torch.equal(model.model(token_rows()).last_hidden_state, base.model(token_rows()).last_hidden_state)


def test_p17_a_classifier_of_two_labels_is_no_reward_model(tmp_path: Path) -> None:
    transformers.Gemma2ForSequenceClassification(tiny_config(SECOND)).save_pretrained(tmp_path)
    with pytest.raises(UserError) as refused:
        GemmaForSequenceClassification.from_pretrained(tmp_path)
    assert str(refused.value) == (
        f"{tmp_path}: a classifier of 2 labels; a reward model gives one number (num_labels 1)"
    )


def test_a_reward_folder_without_its_head_is_refused(tmp_path: Path) -> None:
    model = language_model(SECOND)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    said = json.loads(path.read_text()) | {"architectures": ["Gemma2ForSequenceClassification"], "num_labels": 1}
    path.write_text(json.dumps(said))
    with pytest.raises(UserError) as refused:
        GemmaForSequenceClassification.from_pretrained(tmp_path)
    assert str(refused.value) == f"{tmp_path}: missing keys in the weights: score.weight"


def test_a_reward_model_is_no_language_model(tmp_path: Path) -> None:
    ours(SECOND).save_pretrained(tmp_path)
    with pytest.raises(UserError) as refused:
        GemmaForCausalLM.from_pretrained(tmp_path)
    assert str(refused.value) == f"{tmp_path}: unexpected keys in the weights: score.weight"
