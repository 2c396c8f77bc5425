"""The optimizers of a recipe: what is refused, what is said, and that a run is stepped by what it names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch

from gemma_ft.errors import UserError
from gemma_ft.recipe.load import LoadedRecipe
from gemma_ft.recipe.schema import Train
from gemma_ft.train.distributed import World
from gemma_ft.train.optimizers import check_optimizer, describe_optimizer, optimizer_of


@pytest.mark.parametrize("name", ["adamw8bit", "lion8bit"])
def test_slices_of_ranks_are_refused_in_one_line(name: Any) -> None:
    with pytest.raises(UserError) as caught:
        check_optimizer(Train(optimizer=name), World(size=2, layout="fsdp2"))
    assert str(caught.value) == (
        f"train.optimizer: {name}: its blocks of moments would depend on the number of ranks of FSDP2; use adamw, or "
        "--launch ddp"
    )
    check_optimizer(Train(optimizer=name), World(size=2, layout="ddp"))
    check_optimizer(Train(), World(size=2, layout="fsdp2"))


def test_what_is_kept_in_how_many_bits_is_said() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64, bias=False))
    assert describe_optimizer(Train(), model) is None
    said = describe_optimizer(Train(optimizer="adamw8bit"), model)
    assert said == "adamw8bit: moments of 8,192 weights in 8 bits, 64 in float32 (tensors under 4,096)"


@pytest.mark.parametrize(
    ("name", "theirs"), [("adamw8bit", bitsandbytes.optim.AdamW8bit), ("lion8bit", bitsandbytes.optim.Lion8bit)]
)
def test_groups_are_stepped_as_bitsandbytes_steps_them(name: Any, theirs: Any) -> None:
    """With a decay of its own for each group, and a learning rate that changes."""
    made = optimizer_of(Train(optimizer=name, learning_rate=1e-3))
    assert made is not None
    draw = torch.Generator().manual_seed(0)
    mine, other = ([torch.nn.Parameter(torch.zeros(size)) for size in (8192, 100)] for _ in range(2))
    groups = [[{"params": one[:1], "weight_decay": 0.1}, {"params": one[1:]}] for one in (mine, other)]
    options = {key: value for key, value in made[1].items() if key in ("lr", "betas")}
    ours, expected = made[0](groups[0], **made[1]), theirs(groups[1], weight_decay=0.0, **options)
    for step in range(3):
        for one, two in zip(mine, other, strict=True):
            one.grad = two.grad = torch.randn(one.shape, generator=draw)
        for optimizer in (ours, expected):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 / (step + 1)
            optimizer.step()
    for one, two in zip(mine, other, strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-9)
        assert torch.equal(ours.state[one]["state1"], expected.state[two]["state1"])


def test_a_run_with_moments_in_8_bits_learns_as_one_without(
    recipe_for: Callable[..., LoadedRecipe], train: Callable[..., list[dict[str, Any]]]
) -> None:
    shared = ["strategy=full", "train.learning_rate=3e-4", "train.max_steps=8"]
    plain = train(recipe_for(*shared, out="plain"))
    small = train(recipe_for(*shared, "train.optimizer=adamw8bit", out="small"))
    assert [one["loss"] for one in plain][:2] == pytest.approx([one["loss"] for one in small][:2], rel=1e-3)
    assert small[-1]["loss"] == pytest.approx(plain[-1]["loss"], rel=0.05)
    assert small[-1]["loss"] < small[0]["loss"]
