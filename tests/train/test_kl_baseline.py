"""KTO's z: on four rows as it is worked out by hand, and the same for any cut of them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_ft.adapters.lora import adapter_off
from gemma_ft.build.data import build_data
from gemma_ft.build.inputs import build_tokenizer
from gemma_ft.build.model import build_model
from gemma_ft.data.pack.collate_preferences import PreferenceCollator
from gemma_ft.system.limits import IGNORE
from gemma_ft.train.distributed import World
from gemma_ft.train.kl_baseline import kl_baseline, mismatched
from gemma_ft.train.reference import Reference
from tests.train.preference_runs import preference_recipe, write_pairs


def parts(example: Any) -> tuple[list[int], list[int]]:
    """(prompt, answer with what follows it) of a labelled answer."""
    start = next(at for at, label in enumerate(example["labels"]) if label != IGNORE)
    return example["input_ids"][:start], example["input_ids"][start:]


def by_hand(model: Any, prompt: list[int], answer: list[int], trained: int) -> float:
    """Summed log-probabilities of the first `trained` tokens of an answer, out of the logits of the whole."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(prompt) + at - 1, answer[at]]) for at in range(trained))


def test_z_is_that_of_each_prompt_with_the_next_answer(small_gemma: Path, tmp_path: Path) -> None:
    """Clamped at 0, whatever the micro-batches, packed or not; the answer of the first row goes to the last prompt."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", 2)
    recipe = preference_recipe(small_gemma, pairs, tmp_path / "run", "kto", "strategy=lora").recipe
    tokenizer = build_tokenizer(recipe)
    rows = build_data(recipe, tokenizer).train.examples[:]
    assert len(rows) == 4
    model, _ = build_model(recipe, tokenizer)
    model.train()
    signs = set()
    for seed in range(8):
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.data.normal_(0, 0.05)
        total = 0.0
        with torch.no_grad():
            for number, row in enumerate(rows):
                prompt, (_, answer) = parts(row)[0], parts(other := rows[(number + 1) % 4])
                trained = sum(label != IGNORE for label in other["labels"])
                total += by_hand(model, prompt, answer, trained)
                with adapter_off(model):
                    total -= by_hand(model, prompt, answer, trained)
        signs.add(total > 0)
        for size, budget in ((1, None), (3, None), (4, None), (4, 96)):
            found = kl_baseline(
                model, rows, Reference("adapter_off"), collate=PreferenceCollator(0, budget=budget), pad_id=0,
                size=size, world=World(), device=torch.device("cpu"), autocast=contextlib.nullcontext, step=0,
            )  # fmt: skip
            assert float(found) == pytest.approx(max(0.0, total / 4), abs=1e-4)
            assert found.dtype == torch.float64
    assert signs == {True, False}


def test_a_long_prompt_loses_its_beginning_beside_another_answer() -> None:
    """No mismatched row is longer than the longest of the rows; BOS and the answer stay whole."""

    def row(prompt: int, answer: int) -> dict[str, list[int]]:
        ids = [2, *range(10, 9 + prompt), *range(50, 50 + answer)]
        return {"input_ids": ids, "labels": [IGNORE] * prompt + ids[prompt:]}

    first, second = mismatched([row(20, 2), row(3, 15)])
    assert len(first["input_ids"]) == 22
    assert first["input_ids"] == [2, *range(23, 29), *range(50, 65)]
    assert second["input_ids"] == [2, 10, 11, 50, 51]
    assert first["labels"] == [IGNORE] * 7 + list(range(50, 65))
    assert first["position_ids"] == list(range(22))
