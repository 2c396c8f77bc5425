"""Bootstrap intervals: scipy's, their coverage, pairing, token weights, and that equal seeds give equal numbers."""

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap

from gemma_ft.evaluate import statistics
from gemma_ft.evaluate.statistics import Estimate, difference, estimate, mean, perplexity


def as_rows(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    weights = np.ones(len(values)) if weights is None else weights
    return np.stack([values, weights], axis=1)


def test_a_mean_has_scipys_interval() -> None:
    values = np.random.default_rng(3).gamma(2.0, size=80)
    found = estimate(as_rows(values), mean, resamples=20_000)
    theirs = bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", random_state=1)
    assert found.value == pytest.approx(values.mean())
    assert found.rows == 80
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=0.02)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=0.02)


def test_a_loss_weighs_tokens_not_rows() -> None:
    """A ratio of sums, as scipy has it when it draws (loss, tokens) pairs together."""
    generator = np.random.default_rng(5)
    tokens = generator.integers(1, 200, size=60).astype(float)
    losses = tokens * generator.uniform(0.5, 2.5, size=60)
    found = estimate(as_rows(losses, tokens), mean, resamples=20_000)
    theirs = bootstrap(
        (losses, tokens), lambda a, b, axis: a.sum(axis=axis) / b.sum(axis=axis), n_resamples=20_000, paired=True,
        method="percentile", random_state=1,
    )  # fmt: skip
    assert found.value == pytest.approx(losses.sum() / tokens.sum())
    assert found.value != pytest.approx((losses / tokens).mean(), abs=1e-3)
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=0.02)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=0.02)


def test_the_interval_of_a_perplexity_is_that_of_its_loss() -> None:
    rows = as_rows(np.random.default_rng(1).gamma(3.0, size=40) * 50, np.full(40, 50.0))
    loss, found = estimate(rows, mean), estimate(rows, perplexity)
    assert [found.value, found.low, found.high] == pytest.approx(np.exp([loss.value, loss.low, loss.high]))
    assert estimate(as_rows(np.full(2, 1e4)), perplexity).high == np.exp(700)


def test_95_percent_intervals_hold_the_truth_95_times_in_100() -> None:
    generator = np.random.default_rng(0)
    held = 0
    for trial in range(400):
        found = estimate(as_rows(generator.exponential(size=100)), mean, seed=trial, resamples=400)
        held += found.low <= 1 <= found.high
    assert 0.91 <= held / 400 <= 0.975  # percentile intervals of a skewed mean fall a little short


@pytest.mark.parametrize("right", [0, 1])
@pytest.mark.parametrize("rows", [2, 100])
def test_a_share_of_all_or_none_has_wilsons_interval(right: int, rows: int) -> None:
    found = estimate(as_rows(np.full(rows, float(right))), mean)
    theirs = binomtest(right * rows, rows).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))
    assert found.value == right
    assert estimate(as_rows(np.full(rows, 0.5)), mean).low == 0.5  # not a share


def test_a_paired_difference_cancels_what_both_models_find_hard() -> None:
    generator = np.random.default_rng(2)
    hardness = generator.normal(0, 10, size=50)
    first, second = as_rows(hardness), as_rows(hardness + 0.5 + generator.normal(0, 0.1, size=50))
    gap = difference(second, first, mean)
    assert gap.value == pytest.approx(0.5, abs=0.05)
    assert 0 < gap.low < gap.value < gap.high
    assert gap.high - gap.low < 0.1 < 1 < estimate(first, mean).high - estimate(first, mean).low
    same = difference(first, first, mean)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    other = difference(first, second, mean)
    assert other.low < other.value < other.high < 0


def test_shares_that_differ_alike_in_every_row_have_newcombes_interval() -> None:
    """Against 0 of 10 less 10 of 10 by hand: Wilson's are 0 to 0.2775 and 0.7225 to 1."""
    right, wrong = as_rows(np.ones(10)), as_rows(np.zeros(10))
    found = difference(right, wrong, mean)
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(1 - 0.27753 * 2**0.5, abs=1e-4)
    mixed = as_rows(np.array([1.0, 0, 0, 0]))
    same = difference(mixed, mixed, mean)
    assert same.value == 0
    assert same.low is not None
    assert same.low < -0.2
    assert same.high == pytest.approx(-same.low)


def test_equal_seeds_give_equal_numbers_and_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = as_rows(np.random.default_rng(4).normal(size=30))
    whole = estimate(rows, mean, seed=9)
    assert whole == estimate(rows, mean, seed=9) != estimate(rows, mean, seed=10)
    monkeypatch.setattr(statistics, "BLOCK_CELLS", 30 * 7)
    assert estimate(rows, mean, seed=9).low == pytest.approx(whole.low, rel=1e-12)


def test_a_single_row_has_no_interval() -> None:
    found = estimate(as_rows(np.array([2.0])), mean)
    assert found == Estimate(2.0, None, None, 1)
    assert found.as_dict() == {"value": 2.0, "low": None, "high": None, "rows": 1}
