"""A micro-batch that does not fit is halved before the first step, and the run is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gemma_ft.errors import UserError
from gemma_ft.recipe.batch_plan import BatchPlan
from gemma_ft.recipe.load import LoadedRecipe
from gemma_ft.train.oom import fit_micro_batch
from tests.train.test_trainer import make_trainer

RecipeFor = Callable[..., LoadedRecipe]


def small_memory(trainer: Any, rows: int) -> list[tuple[int, int]]:
    """Have the model run out of memory on more than so many rows; returns the shapes that it is asked for."""
    asked: list[tuple[int, int]] = []

    def look(module: Any, arguments: Any, inputs: dict[str, torch.Tensor]) -> None:
        asked.append(tuple(inputs["input_ids"].shape))
        if len(inputs["input_ids"]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.model.register_forward_pre_hook(look, with_kwargs=True)
    return asked


def losses(trainer: Any) -> list[float]:
    found: list[float] = []
    trainer.listener.on_step = lambda figures: found.append(figures["loss"])
    trainer.train()
    return found


def test_it_is_halved_until_it_fits_and_the_steps_stay_the_same(recipe_for: RecipeFor) -> None:
    loaded = recipe_for("strategy=lora", "train.micro_batch_size=4")
    expected = losses(make_trainer(loaded))
    trainer = make_trainer(loaded)
    asked = small_memory(trainer, 1)
    trainer.batch = fit_micro_batch(trainer)
    longest = int(trainer.data.train.lengths.max())
    assert asked == [(4, longest), (2, longest), (1, longest)]
    assert trainer.batch == BatchPlan(4, 1, 4)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert losses(trainer) == pytest.approx(expected, rel=1e-5)


def test_what_fits_is_left_alone(recipe_for: RecipeFor) -> None:
    trainer = make_trainer(recipe_for("strategy=lora", "train.micro_batch_size=4"))
    asked = small_memory(trainer, 4)
    assert fit_micro_batch(trainer) is trainer.batch
    assert trainer.batch == BatchPlan(4, 4, 1)
    assert len(asked) == 1


def test_a_row_that_does_not_fit_is_told(recipe_for: RecipeFor) -> None:
    trainer = make_trainer(recipe_for("strategy=lora"))
    small_memory(trainer, 0)
    longest = int(trainer.data.train.lengths.max())
    with pytest.raises(UserError) as raised:
        fit_micro_batch(trainer)
    assert str(raised.value) == (
        f"a single row of {longest} tokens does not fit into GPU memory; set train.gradient_checkpointing=true, lower "
        "data.max_seq_len, or --launch fsdp2"
    )
