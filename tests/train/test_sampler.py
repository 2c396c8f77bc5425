"""Which rows each rank trains on: every row once, the same steps for every number of ranks, nothing left to chance."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemma_ft.errors import UserError
from gemma_ft.recipe.batch_plan import accumulation, micro_batch
from gemma_ft.recipe.load import load_recipe
from gemma_ft.train.sampler import StepBatches, WithBlank


@given(st.integers(1, 90), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_ranks_together_train_the_steps_of_one(length: int, micro: int, times: int, ranks: int, epoch: int) -> None:
    step = micro * times * ranks
    alone, *dealt = (
        StepBatches(length, step_rows=step, micro_rows=micro, seed=7, rank=rank, ranks=count)
        for count, rank in [(1, 0), *((ranks, rank) for rank in range(ranks))]
    )
    for batches in (alone, *dealt):
        batches.epoch = epoch
    rows = [list(batches) for batches in dealt]
    assert [len(batches) for batches in dealt] == [len(mine) for mine in rows]
    assert len({len(mine) for mine in rows}) == 1, "every rank computes as often, or the others wait for it"
    order = [row for batch in alone for row in batch]
    assert sorted(order) == list(range(length))
    for number in range(math.ceil(length / step)):
        expected = sorted(order[number * step : (number + 1) * step])
        mine = [row for one in rows for batch in one[number * times : (number + 1) * times] for row in batch]
        assert sorted(row for row in mine if row != length) == expected == sorted(alone.rows_of_step(number))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        batches = StepBatches(50, step_rows=4, micro_rows=2, seed=seed)
        batches.epoch = epoch
        return [row for batch in batches for row in batch]

    torch.manual_seed(0)
    first = order(1, 0)
    torch.manual_seed(99)
    assert order(1, 0) == first
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


@given(st.lists(st.integers(1, 99), min_size=1, max_size=60), st.integers(1, 3), st.integers(1, 4))
def test_rows_of_a_step_are_cut_longest_first(tokens: list[int], micro: int, times: int) -> None:
    """Little is padded, and each step still holds the rows that it would have without."""
    step = micro * times
    plain, sorted_ = (
        list(StepBatches(len(tokens), step_rows=step, micro_rows=micro, seed=3, tokens=given))
        for given in (None, tokens)
    )
    per_step = math.ceil(min(step, len(tokens)) / micro)
    for at in range(0, len(plain), per_step):
        one, other = ([row for batch in batches[at : at + per_step] for row in batch] for batches in (plain, sorted_))
        assert sorted(one) == sorted(other)
        assert [tokens[row] for row in other] == sorted((tokens[row] for row in one), reverse=True)


def test_held_out_rows_keep_their_order() -> None:
    rows = [list(StepBatches(7, step_rows=7, micro_rows=2, seed=None, rank=rank, ranks=2)) for rank in (0, 1)]
    assert rows == [[[0, 1], [4, 5]], [[2, 3], [6]]]


def test_the_blank_row_trains_nothing() -> None:
    data = WithBlank([{"input_ids": [5]}], pad_id=0)
    assert (len(data), data[0]) == (2, {"input_ids": [5]})
    assert data[1] == {"input_ids": [0], "labels": [-100], "position_ids": [0], "document_ids": [-1]}


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
        micro = micro_batch(recipe, ranks)
        assert accumulation(recipe, ranks) * ranks * micro == 32
        assert micro == {1: 4, 2: 4, 16: 2}[ranks]
        return
    with pytest.raises(UserError) as raised:
        accumulation(recipe, ranks)
    assert str(raised.value) == f"train.global_batch_size: {told}"
