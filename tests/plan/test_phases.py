"""A step's moments: the gradients of a trained embedding that live at once, planned and in autograd."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
from torch.profiler import ProfilerActivity, profile

from gemma_ft.plan.activations import WIDE
from gemma_ft.plan.phases import train_moments
from gemma_ft.plan.run import Run
from gemma_ft.plan.shape import preset_shape
from tests.parity.amplified import FIRST, ours, token_rows


def most_held(work: Callable[[], object]) -> int:
    """The most bytes of tensors made by `work` that live at once: what autograd's engine holds among them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    return max(accumulate(one.nbytes() for one in events if one.name() == "[memory]"))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_of_a_trained_embedding_are_planned_as_autograd_holds_them(accumulation: int) -> None:
    model, ids = ours(FIRST, vocab_size=100_003, num_hidden_layers=1).train().float(), token_rows(1, 3)

    def step() -> None:
        for _ in range(accumulation):
            model(ids, labels=ids).loss.backward()

    held = round(most_held(step) / (WIDE * model.lm_head.weight.numel()), 1)
    run = Run(shape=preset_shape("gemma-3-270m"), strategy="full", micro_batch_size=1, tokens=64, rank=0,
              accumulation_steps=accumulation)  # fmt: skip
    gradients = max(moment.device["gradients"] for moment in train_moments(run))
    others = WIDE * (run.shape.parameters - run.shape.embedding)
    assert gradients - others == held * WIDE * run.shape.embedding


def test_adapters_have_one_gradient_each() -> None:
    run = Run(shape=preset_shape("gemma-3-270m"), strategy="lora", micro_batch_size=1, tokens=64, accumulation_steps=2)
    assert max(moment.device["gradients"] for moment in train_moments(run)) == WIDE * run.trained
