"""Checkpointing some layers, all or none is the same run, to the bit; as many are taken as memory asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gemma_ft.recipe.batch_plan import BatchPlan
from gemma_ft.recipe.load import LoadedRecipe
from gemma_ft.system import hardware
from gemma_ft.train.activation_checkpointing import checkpoint_layers, choose_checkpointing
from gemma_ft.train.distributed import World
from gemma_ft.train.oom import fit_micro_batch
from tests.train.test_oom import losses, small_memory
from tests.train.test_resume import EXACT
from tests.train.test_trainer import make_trainer

RecipeFor = Callable[..., LoadedRecipe]
Train = Callable[..., list[dict[str, Any]]]


def gradients(trainer: Any, layers: int) -> dict[str, torch.Tensor]:
    checkpoint_layers(trainer.model, layers)
    trainer.model.train()
    trainer.model.zero_grad()
    torch.manual_seed(3)
    inputs = trainer.data.collate(trainer.data.train.longest(2))
    trainer.model(**inputs, use_cache=False).loss.backward()
    return {name: one.grad.clone() for name, one in trainer.model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("strategy", ["lora", "qlora", "full"])
def test_gradients_are_the_same_to_the_bit(strategy: str, recipe_for: RecipeFor) -> None:
    more = [] if strategy == "full" else ["adapter.dropout=0.1"]
    trainer = make_trainer(recipe_for(f"strategy={strategy}", *more))
    if strategy != "full":  # B is zero at the start, and A then has no gradient
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.1)
    plain = gradients(trainer, 0)
    assert any(bool(one.any()) for one in plain.values())
    for layers in (2, 6):
        found = gradients(trainer, layers)
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name], plain[name]) for name in plain), layers


def test_so_many_of_the_first_layers_run_twice(recipe_for: RecipeFor) -> None:
    trainer = make_trainer(recipe_for("strategy=lora"))
    runs = [0] * 6
    for index, layer in enumerate(trainer.model.get_base_model().model.layers):

        def count(*_: Any, index: int = index) -> None:
            runs[index] += 1

        layer.mlp.register_forward_pre_hook(count)
    gradients(trainer, 2)
    assert runs == [2, 2, 1, 1, 1, 1]


def chosen(loaded: LoadedRecipe, free: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(hardware, "memory_bytes", lambda: (0, free))
    return choose_checkpointing(loaded.recipe, BatchPlan(4, 2, 2), tokens=2048, world=World())


def test_memory_decides_and_the_recipe_may(recipe_for: RecipeFor, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = recipe_for("strategy=lora")
    assert auto.recipe.train.gradient_checkpointing == "auto"
    counts = [chosen(auto, free, monkeypatch).run.checkpointed for free in (2**40, 1_100_000_000, 2**20)]
    assert counts[0] == 0 < counts[1] < 6 == counts[2]
    for said, count in (("true", 6), ("false", 0)):
        found = chosen(recipe_for("strategy=lora", f"train.gradient_checkpointing={said}"), 2**30, monkeypatch)
        assert (found.run.checkpointed, found.auto) == (count, False)


def test_the_choice_is_told_in_a_line(recipe_for: RecipeFor, monkeypatch: pytest.MonkeyPatch) -> None:
    few = chosen(recipe_for("strategy=lora"), 1_100_000_000, monkeypatch)
    planned, room = (size / 2**30 for size in (few.planned, few.room))
    layers = few.run.checkpointed
    assert few.describe() == (
        f"the first {layers} of 6 layers recompute their activations; {planned:.1f} GiB planned of {room:.1f} GiB"
    )
    assert chosen(recipe_for("strategy=lora"), 2**40, monkeypatch).describe().startswith(
        "no layer recomputes its activations; ")  # fmt: skip
    asked = chosen(recipe_for("strategy=lora", "train.gradient_checkpointing=true"), 2**40, monkeypatch)
    assert asked.describe().startswith("all 6 layers recompute their activations, as the recipe says; ")


@pytest.mark.parametrize(
    ("before", "after"), [("false", "true"), pytest.param("true", "false", marks=pytest.mark.slow)]
)
def test_a_resumed_run_may_have_another_choice(before: str, after: str, recipe_for: RecipeFor, train: Train) -> None:
    """And is the run that was not interrupted, bit for bit."""
    same = ["strategy=lora", "train.schedule=constant"]
    straight = train(recipe_for(*same, f"train.gradient_checkpointing={before}", out="straight"))
    train(recipe_for(*same, f"train.gradient_checkpointing={before}", "train.max_steps=2"))
    resumed = train(recipe_for(*same, f"train.gradient_checkpointing={after}", "train.max_steps=4"), resume=True)
    assert [line["step"] for line in resumed] == [1, 2, 3, 4]
    exact = [[{name: line[name] for name in EXACT} for line in lines] for lines in (resumed, straight)]
    assert exact[0] == exact[1]


def test_where_memory_is_short_all_layers_come_before_smaller_micro_batches(
    recipe_for: RecipeFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = recipe_for("strategy=lora", "train.micro_batch_size=4")
    expected = losses(make_trainer(loaded))
    trainer = make_trainer(loaded)
    trainer.checkpointing = chosen(loaded, 2**40, monkeypatch)
    asked = small_memory(trainer, 2)
    trainer.batch = fit_micro_batch(trainer)
    assert trainer.batch == BatchPlan(4, 2, 2)
    longest = int(trainer.data.train.lengths.max())
    assert asked == [(4, longest), (4, longest), (2, longest)]
    assert trainer.checkpointing.run.checkpointed == 6
    assert losses(trainer) == pytest.approx(expected, rel=1e-5)


def test_the_cure_is_the_planners(recipe_for: RecipeFor, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(recipe_for("strategy=lora"))
    plan = chosen(recipe_for("strategy=lora"), 2**20, monkeypatch)
    trainer.checkpointing = plan
    small_memory(trainer, 0)
    longest = int(trainer.data.train.lengths.max())
    with pytest.raises(Exception, match="does not fit") as raised:
        fit_micro_batch(trainer)
    assert str(raised.value) == (
        f"a single row of {longest} tokens does not fit into GPU memory; set strategy=qlora, or --launch fsdp2"
    )
    assert plan.cure(2) == "train.micro_batch_size=1"
