"""A step's moments: the gradients of a trained embedding that live at once, planned and in autograd."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
from torch.profiler import ProfilerActivity, profile

from gemma_ft.plan import parts
from gemma_ft.plan.activations import WIDE
from gemma_ft.plan.phases import phases, train_moments
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


DPO = Run(shape=preset_shape("gemma-3-270m"), strategy="lora", micro_batch_size=2, tokens=256, objective="dpo",
          reference="adapter_off")  # fmt: skip


def test_a_pair_takes_what_two_sequences_take() -> None:
    """Its reference takes less at any time than what the policy keeps for backward, and no memory of its own."""
    sft = DPO.changed(objective="sft", reference="none", micro_batch_size=4)
    assert max(moment.total for moment in train_moments(DPO)) == max(moment.total for moment in train_moments(sft))
    assert len(train_moments(DPO)) == len(train_moments(sft)) + 1
    of_reference = train_moments(DPO)[0]
    assert (
        of_reference.device["activations"] + of_reference.device["head"] < train_moments(DPO)[1].device["activations"]
    )


def test_the_frozen_copy_of_a_start_is_one_adapter_more() -> None:
    assert parts.trained(DPO.changed(reference="start")) == 2 * parts.trained(DPO) == 2 * WIDE * DPO.trained


@pytest.mark.parametrize(("reference", "models"), [("adapter_off", 0), ("precomputed", 1), ("runs/mine", 2)])
def test_what_is_computed_before_training_is_a_phase(reference: str, models: int) -> None:
    """A live reference has none; another model lies beside the one that is trained, while it is asked."""
    found = [phase for phase in phases(DPO.changed(reference=reference)) if phase.name == "reference"]
    assert [phase.device["weights"] for phase in found] == [models * parts.weights(DPO)] * bool(models)


def test_a_reward_model_has_one_number_for_a_head() -> None:
    reward = DPO.changed(objective="reward", reference="none")
    assert reward.trained == DPO.trained + DPO.shape.hidden
    assert parts.head(DPO, 4) - parts.head(reward, 4) > 2**20  # a chunk of logits
