"""Packing puts every document into exactly one row, within the budget, the same way each time."""

import random

from hypothesis import given
from hypothesis import strategies as st

from gemma_ft.data.pack.packing import best_fit_decreasing


@given(budget=st.integers(1, 60), data=st.data())
def test_nothing_lost_nothing_twice_budget_kept(budget: int, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, budget), max_size=60))
    rows = best_fit_decreasing(lengths, budget)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= budget for row in rows)
    assert rows == best_fit_decreasing(lengths, budget)


@given(budget=st.integers(1, 60), data=st.data())
def test_each_document_went_into_the_fullest_row_with_room(budget: int, data: st.DataObject) -> None:
    """Against the rule written out plainly: as many rows, filled alike."""
    lengths = data.draw(st.lists(st.integers(1, budget), max_size=60))
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [at for at, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda at: rooms[at])] -= length
        else:
            rooms.append(budget - length)
    packed = best_fit_decreasing(lengths, budget)
    assert sorted(budget - sum(lengths[index] for index in row) for row in packed) == sorted(rooms)


def test_order_is_the_datas_own() -> None:
    assert best_fit_decreasing([3, 9, 2, 5, 1], 10) == [[0, 2, 3], [1, 4]]


def test_of_a_hundred_thousand_documents_none_opened_a_row_without_need() -> None:
    """A document that opened a row, its longest, fitted into none of the rows that were open by then."""
    draw = random.Random(0)
    lengths = [draw.randint(1, 2048) for _ in range(100_000)]
    rows = best_fit_decreasing(lengths, 2048)
    assert sorted(index for row in rows for index in row) == list(range(100_000))
    opened = sorted(
        (min((-lengths[index], index) for index in row), row) for row in rows
    )  # longest first, then by index
    most_room = -1
    for (opener, _), row in opened:
        assert most_room < -opener
        most_room = max(most_room, 2048 - sum(lengths[index] for index in row))
