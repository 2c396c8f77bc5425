"""Objectives over pairs and labelled answers on numbers that were worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gemma_ft.train.micro_batch import means_of, summed, token_weights
from gemma_ft.train.objectives.registry import build_objective
from tests.train.preferences import divisors_of, in_place, labelled_batch, loss_of, pairs_batch

CHOSEN, REJECTED = [-0.5, -1.5], [-1.0, -1.0, -2.0]  # log p of their tokens: -2 and -4 in sum, -1 and -4/3 in the mean
REFERENCE = [-2.5, -3.5]  # so that log p - log q is 0.5 and -0.5


def one_pair() -> tuple[dict[str, Tensor], Tensor]:
    batch = pairs_batch([([2, 5], [6, 7], [8, 9, 10])])
    return {**batch, "reference_logprobs": torch.tensor(REFERENCE)}, in_place(batch, [CHOSEN, REJECTED])


# Loss; minus its derivative by the log-probability of each token of the chosen and of the rejected answer.
PAIRS: list[tuple[str, dict[str, Any], float, float, float]] = [
    ("dpo", {}, 0.64439666007, 0.0475020812521, -0.0475020812521),  # -log s(0.1 * 1); 0.1 * s(-0.1)
    ("dpo", {"beta": 0.5}, 0.474076984180, 0.188770334399, -0.188770334399),
    (
        "dpo",
        {"label_smoothing": 0.1},
        0.65439666007,
        0.0375020812521,
        -0.0375020812521,
    ),  # 0.9 * .6443967 + 0.1 * .7443967
    (
        "dpo",
        {"length_normalized": True},
        0.672530845419,
        0.0244792420056,
        -0.0163194946704,
    ),  # x = 0.1 * (0.5/2 + 0.5/3)
    ("dpo", {"sft_weight": 0.5}, 1.14439666007, 0.2975020812521, -0.0475020812521),  # + 0.5 * 2 / 2, 0.5 / 2 a token
    ("ipo", {}, 21.0069444444, 4.5833333333, -3.0555555556),  # (0.25 + 1/6 - 5)^2; 2 * 4.58333 / 2 and / 3
    ("ipo", {"beta": 1.0, "sft_weight": 1.0}, 1.0069444444, 0.58333333333, -0.055555555556),
    ("orpo", {}, 1.0479373981, 0.5301231396, -0.0172382599),
    ("simpo", {}, 0.8736389080, 0.5825702065, -0.3883801376),  # x = 2 (-1) - 2 (-4/3) - 1 = -1/3; 2 s(1/3) / 2 and / 3
    ("simpo", {"beta": 1.0, "gamma": 0.0, "sft_weight": 1.0}, 1.5403055746, 0.7087148968, -0.1391432645),
]


@pytest.mark.parametrize(("kind", "settings", "loss", "chosen", "rejected"), PAIRS)
def test_a_pair(kind: str, settings: dict[str, Any], loss: float, chosen: float, rejected: float) -> None:
    batch, logprobs = one_pair()
    objective = build_objective(kind, **settings)
    value, weights = token_weights(objective, logprobs, batch, divisors_of(objective, [batch]))
    assert float(value) == pytest.approx(loss, rel=1e-8)
    assert weights[0].tolist() == pytest.approx([0, 0, chosen, chosen, 0], rel=1e-8)
    assert weights[1].tolist() == pytest.approx([0, 0, rejected, rejected, rejected], rel=1e-8)


def near(figures: dict[str, tuple[float, float]]) -> dict[str, Any]:
    return {name: pytest.approx(figure, rel=1e-6, abs=1e-12) for name, figure in figures.items()}


def test_labelled_answers() -> None:
    """d = 0.5 of a good one and -0.5 of a bad one, z = 0.2: 1 - s(0.03) and 1 - s(0.07)."""
    batch = labelled_batch([([2, 5], [6, 7], True), ([2, 5], [8, 9, 10], False)], baseline=0.2)
    batch["reference_logprobs"] = torch.tensor(REFERENCE)
    logprobs = in_place(batch, [CHOSEN, REJECTED])
    assert float(loss_of(build_objective("kto"), logprobs, batch)) == pytest.approx((0.49250056 + 0.48250714) / 2)
    weighted = build_objective("kto", desirable_weight=2.0, undesirable_weight=0.5)
    assert float(loss_of(weighted, logprobs, batch)) == pytest.approx((2 * 0.49250056 + 0.5 * 0.48250714) / 2)
    wide = {**batch, "row_weights": torch.tensor([3.0, 1.0])}  # a row of weight 3 is the row three times
    assert float(loss_of(build_objective("kto"), logprobs, wide)) == pytest.approx((3 * 0.49250056 + 0.48250714) / 4)
    assert build_objective("kto").figures(logprobs, batch) == near(
        {
            "rewards/chosen": (0.05, 1),
            "rewards/rejected": (-0.05, 1),
            "logps/chosen": (-2, 1),
            "logps/rejected": (-4, 1),
            "lengths/chosen": (2, 1),
            "lengths/rejected": (3, 1),
            "kl": (0.4, 2),
        }
    )


def test_rewards() -> None:
    """Two pairs, one with a margin: -log s(0.75) and -log s(-1); 0.01 times 2^2 and 3^2."""
    batch = pairs_batch([([2], [5], [6]), ([2], [7], [8])], margins=[0.25, 0.0])
    rewards = torch.tensor([1.5, 0.5, 1.0, 2.0], dtype=torch.float64)
    first, second = 0.3868710061, 1.3132616875
    plain, centred = build_objective("reward", centering=0.0), build_objective("reward")
    assert float(loss_of(plain, rewards, batch)) == pytest.approx((first + second) / 2, rel=1e-8)
    assert float(loss_of(centred, rewards, batch)) == pytest.approx((first + second + 0.04 + 0.09) / 2, rel=1e-8)
    value, weights = token_weights(plain, rewards, batch, divisors_of(plain, [batch]))
    assert float(value) == pytest.approx((first + second) / 2, rel=1e-8)
    assert weights.tolist() == pytest.approx(
        [0.1604106504, -0.1604106504, 0.3655292893, -0.3655292893], rel=1e-8
    )  # s(-x) / 2
    assert plain.figures(rewards, batch) == {
        "rewards/chosen": (2.5, 2),
        "rewards/rejected": (2.5, 2),
        "rewards/margins": (0, 2),
        "rewards/accuracies": (1, 2),
        "lengths/chosen": (2, 2),
        "lengths/rejected": (2, 2),
    }


def test_figures_of_a_pair() -> None:
    batch, logprobs = one_pair()
    lengths = {"lengths/chosen": (2, 1), "lengths/rejected": (3, 1), "logps/chosen": (-2, 1), "logps/rejected": (-4, 1)}
    compared = {
        "rewards/chosen": (0.05, 1),
        "rewards/rejected": (-0.05, 1),
        "rewards/margins": (0.1, 1),
        "rewards/accuracies": (1, 1),
        "rewards/margins_per_token": (0.05 / 2 + 0.05 / 3, 1),
        "kl": (0, 2),
    }
    assert build_objective("dpo").figures(logprobs, batch) == near(compared | lengths)
    assert build_objective("ipo").figures(logprobs, batch) == near(compared | lengths)
    alone = {"rewards/chosen": (-2, 1), "rewards/rejected": (-8 / 3, 1), "rewards/margins": (2 / 3, 1)}
    alone |= {"rewards/accuracies": (1, 1)}
    assert build_objective("simpo").figures(logprobs, batch) == near(alone | lengths)
    odds = {"log_odds_chosen": (0.4860305354, 1), "log_odds_ratio": (-0.4793739812, 1), "log_odds_clamped": (0, 2)}
    tenth = {name: (value / 20, count) for name, (value, count) in alone.items() if name != "rewards/accuracies"}
    expected = alone | tenth | lengths | odds | {"nll_loss": (2, 2)}
    assert build_objective("orpo").figures(logprobs, batch) == near(expected)


def test_margin_of_labelled_answers_is_that_of_their_means() -> None:
    batch = labelled_batch([([2, 5], [6, 7], True), ([2, 5], [8, 9, 10], False)], baseline=0.2)
    batch["reference_logprobs"] = torch.tensor(REFERENCE)
    kto = build_objective("kto")
    figures = kto.figures(in_place(batch, [CHOSEN, REJECTED]), batch)
    several = summed([figures, {name: (3 * value, 3 * count) for name, (value, count) in figures.items()}])
    assert means_of(several, list)["rewards/margins"] == pytest.approx(0.1)
    one_label = {name: (0.0, 0.0) if name.endswith("rejected") else pair for name, pair in figures.items()}
    assert means_of(one_label, list)["rewards/margins"] is None
    pairs = {"rewards/chosen": (1.0, 2.0), "rewards/rejected": (0.0, 2.0), "rewards/margins": (7.0, 2.0)}
    assert means_of(pairs, list)["rewards/margins"] == 3.5
