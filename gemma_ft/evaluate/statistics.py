"""How sure a figure is: bootstrap confidence intervals over rows, and over paired differences on the same rows.

Every figure here is a function of sums over rows: a mean of (total, count), a loss of (losses, tokens), BLEU of n-gram
counts. A resample weighs each row with how often it was drawn, so that thousands of resamples are one matrix product.
Letters: N rows, K sums, S resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Figure = Callable[[Floats], Floats]  # sums [S, K] -> a figure each [S]

RESAMPLES = 2000
CONFIDENCE = 0.95
Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
BLOCK_CELLS = 2**22  # of the weights [S, N] at a time: 32 MiB


@dataclass(frozen=True)
class Estimate:
    """A figure over `rows` rows and its 95% interval; low and high are None for a single row, which tells no spread."""

    value: float
    low: float | None
    high: float | None
    rows: int

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, for a report file."""
        return asdict(self)


def mean(sums: Floats) -> Floats:
    """Sums [S, 2] of (total, weight) -> the weighted mean [S]."""
    return sums[:, 0] / sums[:, 1]


def perplexity(sums: Floats) -> Floats:
    """Sums [S, 2] of (loss in nats, tokens) -> exp of the mean loss [S], at most e^700: it has to be written down."""
    return np.exp(np.minimum(mean(sums), 700.0))


def estimate(rows: Floats, figure: Figure, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """A figure of rows [N, K] and its percentile interval over resamples of whole rows, drawn with replacement.

    Equal seeds and row counts draw equal rows. Source: Efron and Tibshirani, An Introduction to the Bootstrap, ch. 13.
    Where every row is right, or every row wrong, resampling knows no spread: the interval of such a share is Wilson's
    (J. Am. Stat. Assoc. 22, 1927).
    """
    if _is_share(rows, figure) and np.ptp(rows[:, 0]) == 0:
        share = float(rows[:, 0].mean())
        return Estimate(share, *wilson(share, len(rows)), len(rows))
    return _interval(_of_all(rows, figure), len(rows), lambda: _resampled(rows, figure, seed, resamples))


def difference(rows: Floats, minus: Floats, figure: Figure, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """A figure of `rows` [N, K] less that of `minus` [N, K], row for row of the same questions: each resample draws the
    same rows for both, so that what makes a row hard for both cancels. Source: as `estimate`, ch. 8 and 13.

    Where a share differs in every row alike, resampling knows no spread: it is then made of Wilson's two, as
    in Newcombe, Interval estimation for the difference between independent proportions (Stat. Med. 17, 1998),
    method 10, which takes nothing from the pairing.
    """
    assert len(rows) == len(minus), "a paired difference is over the same rows"
    if _is_share(rows, figure) and _is_share(minus, figure) and np.ptp(rows[:, 0] - minus[:, 0]) == 0:
        share, other = _of_all(rows, figure), _of_all(minus, figure)
        (low, high), (minus_low, minus_high) = wilson(share, len(rows)), wilson(other, len(minus))
        down, up = np.hypot(share - low, minus_high - other), np.hypot(high - share, other - minus_low)
        return Estimate(share - other, float(share - other - down), float(share - other + up), len(rows))
    return _interval(
        _of_all(rows, figure) - _of_all(minus, figure),
        len(rows),
        lambda: _resampled(rows, figure, seed, resamples) - _resampled(minus, figure, seed, resamples),
    )


def _is_share(rows: Floats, figure: Figure) -> bool:
    """Whether rows [N, 2] are of right or wrong, each weighing the same, and more than one."""
    return figure is mean and len(rows) > 1 and bool((rows[:, 1] == 1).all() and np.isin(rows[:, 0], (0, 1)).all())


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's 95% interval of the share that is right among so many."""
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    reach = Z * np.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2)) / (1 + Z**2 / count)
    return max(0.0, float(middle - reach)), min(1.0, float(middle + reach))


def _of_all(rows: Floats, figure: Figure) -> float:
    return float(figure(rows.sum(axis=0)[None])[0])


def _interval(value: float, rows: int, resampled: Callable[[], Floats]) -> Estimate:
    if rows < 2:
        return Estimate(value, None, None, rows)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(resampled(), [tail, 100 - tail])
    return Estimate(value, float(low), float(high), rows)


def _resampled(rows: Floats, figure: Figure, seed: int, resamples: int) -> Floats:
    return np.concatenate([figure(weights @ rows) for weights in _weights(len(rows), seed, resamples)])


def _weights(rows: int, seed: int, resamples: int) -> Iterator[Floats]:
    """How often each row is drawn in each resample, [s, N] at a time; the same numbers for the same arguments."""
    generator = np.random.default_rng(seed)
    block = max(1, BLOCK_CELLS // rows)
    for start in range(0, resamples, block):
        drawn = generator.multinomial(rows, np.full(rows, 1 / rows), size=min(block, resamples - start))
        yield drawn.astype(np.float64)
