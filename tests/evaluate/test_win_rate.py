"""How often answers got better: by hand, and where only their length did."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from gemma_ft.evaluate.win_rate import win_rate

EQUAL = [(10, 10)] * 4


def test_four_rows_by_hand() -> None:
    """Two better, one tie, one worse: 2.5 of 4."""
    found = win_rate([0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 2.0, 1.0], [(10, 12), (20, 22), (30, 28), (40, 38)])
    assert found["value"] == 2.5 / 4
    assert (found["rows"], found["length_before"], found["length_after"]) == (4, 25.0, 25.0)
    assert 0 <= found["low"] < found["value"] < found["high"] <= 1
    assert list(found) == ["value", "low", "high", "rows", "length_controlled", "length_before", "length_after"]


def test_ties_are_half_and_swapping_the_models_mirrors_it() -> None:
    ties = win_rate([1.0] * 4, [1.0] * 4, EQUAL)
    assert (ties["value"], ties["length_controlled"]) == (0.5, 0.5)
    before, after = [0.0, 0.0, 5.0, 1.0, 2.0], [1.0, 2.0, 1.0, 1.0, 3.0]
    lengths = [(5, 9), (4, 4), (9, 2), (7, 8), (1, 6)]
    one, other = win_rate(before, after, lengths), win_rate(after, before, [(b, a) for a, b in lengths])
    assert one["value"] == pytest.approx(1 - other["value"])
    assert one["length_controlled"] == pytest.approx(1 - other["length_controlled"])


def test_with_equal_lengths_nothing_is_controlled() -> None:
    found = win_rate([0.0] * 4, [1.0, 1.0, 1.0, -1.0], EQUAL)
    assert found["value"] == found["length_controlled"] == 0.75


def test_a_judge_of_length_alone_sees_no_better_answers() -> None:
    """The longer answer wins, whatever it says; most answers grew. At equal lengths it is a coin."""
    grown = [-10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 30, 40, 50, 20, 30]
    lengths = [(100, 100 + more) for more in grown]
    found = win_rate([100.0] * len(grown), [100.0 + more for more in grown], lengths)
    assert found["value"] == pytest.approx(10.5 / 15)
    assert found["length_controlled"] == pytest.approx(0.5, abs=0.01)
    assert found["length_after"] > found["length_before"]


def test_better_answers_of_any_length_stay_better() -> None:
    """Four of five win at each length, so that length explains nothing."""
    lengths = [(50, 50 + more) for more in (-20, -5, 5, 20) for _ in range(5)]
    found = win_rate([0.0] * 20, [1.0, 1.0, 1.0, 1.0, -1.0] * 4, lengths)
    assert found["value"] == pytest.approx(0.8)
    assert found["length_controlled"] == pytest.approx(0.8, abs=0.01)


def test_it_is_the_regression_that_it_says() -> None:
    """Wins drawn by a law of quality and length: at equal lengths the law's own share."""
    generator = np.random.default_rng(0)
    longer = generator.normal(8, 10, 20_000)
    share = 1 / (1 + np.exp(-(0.4 + 1.5 * np.tanh(longer / longer.std()))))
    won = np.where(generator.random(20_000) < share, 1.0, -1.0)
    found = win_rate([0.0] * 20_000, won.tolist(), np.stack((np.full(20_000, 100.0), 100 + longer), axis=1).tolist())
    assert found["length_controlled"] == pytest.approx(1 / (1 + np.exp(-0.4)), abs=0.015)
    assert found["value"] > found["length_controlled"] + 0.05


@pytest.mark.parametrize("more", [(3, 9), (-3, -9), (4, 4)])
def test_where_all_answers_grew_nothing_is_told_of_equal_lengths(more: tuple[int, int]) -> None:
    found = win_rate([0.0, 0.0], [1.0, -1.0], [(10, 10 + one) for one in more])
    assert (found["value"], found["length_controlled"]) == (0.5, None)


@pytest.mark.parametrize(
    ("longer", "won", "controlled"),
    [
        ([9.0] * 9 + [-1.0], [1.0] * 9 + [-1.0], None),
        ([0.0, 9.0], [1.0, -1.0], None),
        ([9.0, 9.0, 9.0, -9.0], [1.0, 1.0, 1.0, -1.0], None),
        ([5.0, -5.0], [1.0, 1.0], 1.0),
        ([5.0, -5.0], [0.0, 0.0], 0.5),
    ],
)
def test_where_lengths_part_won_and_lost_nothing_is_told(
    longer: list[float], won: list[float], controlled: float | None
) -> None:
    found = win_rate([0.0] * len(won), won, [(100, 100 + int(more)) for more in longer])
    assert found["length_controlled"] == controlled


def test_any_rows_give_a_share() -> None:
    """One row, rows that all agree, lengths that decide all: no overflow, no singular system."""
    generator = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(200):
            count = int(generator.integers(1, 30))
            longer = generator.integers(-50, 50, count) * 10 ** int(generator.integers(0, 4))
            after = np.sign(longer - generator.integers(-5, 5)).astype(float)
            found = win_rate([0.0] * count, after.tolist(), [(10_000_000, 10_000_000 + int(more)) for more in longer])
            won, lost = longer[after >= 0], longer[after <= 0]
            parted = len(won) and len(lost) and (won.min() > lost.max() or lost.min() > won.max())
            if parted or not longer.min() <= 0 <= longer.max():
                assert found["length_controlled"] is None
            else:
                assert 0 <= found["length_controlled"] <= 1
            assert found["rows"] == count
        one = win_rate([0.0], [1.0], [(3, 7)])
    assert (one["value"], one["low"], one["high"], one["rows"]) == (1.0, None, None, 1)
