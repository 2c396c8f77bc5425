"""Which rows each rank trains on: every row once, the same steps for every number of ranks, nothing left to chance."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemma_ft.errors import UserError
from gemma_ft.recipe.batch_plan import BatchPlan, batch_plan
from gemma_ft.recipe.load import load_recipe
from gemma_ft.train.sampler import StepRows, collated, dealt


def epoch_of(rows: StepRows, epoch: int = 0) -> list[list[list[int]]]:
    """The micro-batches of each step of an epoch, on one rank."""
    first = epoch * rows.steps_per_epoch
    return [rows.micro_batches(step) for step in range(first, first + rows.steps_per_epoch)]


@given(st.integers(1, 90), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_ranks_together_train_the_steps_of_one(length: int, micro: int, times: int, ranks: int, epoch: int) -> None:
    step = micro * times * ranks
    alone = StepRows(length, BatchPlan(step, micro, times * ranks), seed=7)
    dealt = [StepRows(length, BatchPlan(step, micro, times, ranks), seed=7, rank=rank) for rank in range(ranks)]
    of_one, of_each = epoch_of(alone, epoch), [epoch_of(rows, epoch) for rows in dealt]
    order = [row for batches in of_one for batch in batches for row in batch]
    assert sorted(order) == list(range(length))
    assert len(of_one) == math.ceil(length / step) == alone.steps_per_epoch
    for number, batches in enumerate(of_one):
        expected = sorted(row for batch in batches for row in batch)
        mine = [steps[number] for steps in of_each]
        assert len({len(one) for one in mine}) == 1, "every rank computes as often, or the others wait for it"
        rows = [row for one in mine for batch in one for row in batch]
        assert sorted(row for row in rows if row != length) == expected
        assert expected == sorted(alone.rows_of_step(epoch * alone.steps_per_epoch + number))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        rows = StepRows(50, BatchPlan(4, 2, 2), seed=seed)
        return [row for batches in epoch_of(rows, epoch) for batch in batches for row in batch]

    torch.manual_seed(0)
    first = order(1, 0)
    torch.manual_seed(99)
    assert order(1, 0) == first
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_a_step_is_the_same_whatever_was_asked_for_before() -> None:
    forwards, backwards = (StepRows(10, BatchPlan(4, 2, 2), seed=1) for _ in range(2))
    found = [forwards.micro_batches(step) for step in range(9)]
    assert [backwards.micro_batches(step) for step in reversed(range(9))] == found[::-1]
    assert found[0] != found[3] != found[6]  # of three epochs


@given(st.lists(st.integers(1, 99), min_size=1, max_size=60), st.integers(1, 3), st.integers(1, 4))
def test_rows_of_a_step_are_cut_longest_first(tokens: list[int], micro: int, times: int) -> None:
    """Little is padded, and each step still holds the rows that it would have without."""
    plan = BatchPlan(micro * times, micro, times)
    plain, sorted_ = (epoch_of(StepRows(len(tokens), plan, seed=3, tokens=given)) for given in (None, tokens))
    for batches, others in zip(plain, sorted_, strict=True):
        one, other = ([row for batch in some for row in batch] for some in (batches, others))
        assert sorted(one) == sorted(other)
        assert [tokens[row] for row in other] == sorted((tokens[row] for row in one), reverse=True)


def test_held_out_rows_keep_their_order() -> None:
    rows = [dealt(range(7), 2, blank=7, rank=rank, ranks=2) for rank in (0, 1)]
    assert rows == [[[0, 1], [4, 5]], [[2, 3], [6]]]


def test_the_blank_row_trains_nothing() -> None:
    blank = {"input_ids": [0], "labels": [-100], "position_ids": [0], "document_ids": [-1]}
    assert collated([{"input_ids": [5]}], [0, 1], list, 0) == [{"input_ids": [5]}, blank]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ranks", "told"),
    [
        (1, None),
        (2, None),
        (16, None),
        (3, "32 rows cannot be dealt to 3 devices; use 1 or 2 devices, or global_batch_size 30 or 33"),
        (64, "32 rows cannot be dealt to 64 devices; use 16 or 32 devices, or global_batch_size 64"),
    ],
)
def test_a_global_batch_is_dealt_whole_or_refused(ranks: int, told: str | None) -> None:
    recipe = load_recipe("sft_tiny", ["train.global_batch_size=32", "train.micro_batch_size=4"]).recipe
    if told is None:
        assert batch_plan(recipe, ranks) == BatchPlan(32, *{1: (4, 8), 2: (4, 4), 16: (2, 1)}[ranks], ranks)
        return
    with pytest.raises(UserError) as raised:
        batch_plan(recipe, ranks)
    assert str(raised.value) == f"train.global_batch_size: {told}"


def test_a_smaller_plan_is_the_same_step() -> None:
    plan = BatchPlan(36, 9, 2, 2)
    assert plan.smaller() == BatchPlan(36, 3, 6, 2)
    assert plan.smaller().smaller() == BatchPlan(36, 1, 18, 2)
    with pytest.raises(AssertionError, match="without a rest"):
        BatchPlan(10, 3, 3)
