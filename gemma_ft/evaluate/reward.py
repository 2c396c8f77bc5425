"""How good a reward model is: how often it prefers the better answer of held-out pairs, and whether it is as sure as it
is right.

Letters: P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gemma_ft.data.conversation import Pair
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.evaluate import statistics
from gemma_ft.evaluate.results import Scored
from gemma_ft.evaluate.statistics import Floats
from gemma_ft.infer.scorer import rewards_of, scored_ids

ACCURACY, LOSS, MARGIN = "accuracy", "loss", "margin"
BINS = 5  # of the probability that a model gives to the answer it prefers, from a half to 1


def pair_sequences(
    pairs: Sequence[Pair], encoder: ChatEncoder, *, max_seq_len: int
) -> tuple[list[tuple[list[int], list[int]]], int]:
    """The token ids of both halves of each pair, up to where their rewards are read, and how many pairs were left out
    because one half has more than `max_seq_len` tokens: an answer that was cut is another answer.
    """
    flat = scored_ids(encoder, [half for pair in pairs for half in pair.halves])
    both = list(zip(flat[::2], flat[1::2], strict=True))
    kept = [one for one in both if max(map(len, one)) <= max_seq_len]
    return kept, len(both) - len(kept)


def pair_rewards(
    model: Any,
    sequences: Sequence[tuple[list[int], list[int]]],
    *,
    pad_id: int,
    batch_size: int,
    on_progress: Callable[[int], None] = lambda count: None,
) -> Floats:
    """The rewards of the chosen and the rejected answer of each pair, [P, 2]. Raises: UserError, as rewards_of."""
    flat = [one for pair in sequences for one in pair]
    found = rewards_of(model, flat, pad_id=pad_id, batch_size=batch_size, on_progress=on_progress)
    return np.asarray(found, dtype=np.float64).reshape(-1, 2)


def reward_scores(rewards: Floats) -> dict[str, Scored]:
    """Figures of rewards [P, 2], over pairs: the share in which the chosen answer has more (a tie counts a half), the
    mean of -log sigmoid(R(chosen) - R(rejected)), and the mean of R(chosen) - R(rejected).
    """
    margins = rewards[:, 0] - rewards[:, 1]
    right = (np.sign(margins) + 1) / 2
    losses = np.logaddexp(0.0, -margins)
    return {
        name: Scored(np.stack((values, np.ones_like(values)), axis=1), statistics.mean)
        for name, values in ((ACCURACY, right), (LOSS, losses), (MARGIN, margins))
    }


def calibration(rewards: Floats, *, bins: int = BINS) -> list[dict[str, Any]]:
    """Pairs by how sure the model is of the answer that it prefers, sigmoid(|R(chosen) - R(rejected)|), in equal bins
    from a half to 1: the bin's bounds, how many pairs, the mean probability in it, and the share in which the preferred
    answer is the chosen one, with its interval; None where there is no pair. A calibrated model is right as often as it
    is sure. Source: Guo et al., arXiv:1706.04599 section 2.
    """
    margins = rewards[:, 0] - rewards[:, 1]
    sure = 1 / (1 + np.exp(-np.abs(margins)))
    right = (np.sign(margins) + 1) / 2
    number = np.minimum(((sure - 0.5) * 2 * bins).astype(int), bins - 1)
    found: list[dict[str, Any]] = []
    for index in range(bins):
        inside = number == index
        row: dict[str, Any] = {"from": 0.5 + index / (2 * bins), "to": 0.5 + (index + 1) / (2 * bins)}
        row |= {"pairs": int(inside.sum()), "probability": None, "right": None}
        if row["pairs"]:
            share = np.stack((right[inside], np.ones(row["pairs"])), axis=1)
            row["probability"] = float(sure[inside].mean())
            row["right"] = statistics.estimate(share, statistics.mean).as_dict()
        found.append(row)
    return found
