"""What objectives over pairs and labelled answers hold to, whatever the numbers: where they start, what may be
exchanged, that no cut of a step changes them, and that they are trained as by autograd through whole logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from gemma_ft.train.micro_batch import token_weights
from gemma_ft.train.objectives.answers import halves, summed_logprobs
from gemma_ft.train.objectives.orpo import SURE, log_odds
from gemma_ft.train.objectives.registry import Objective, build_objective
from gemma_ft.train.objectives.sft import SupervisedFineTuning
from tests.parity.amplified import FIRST, SECOND, VOCAB, ours
from tests.train.preferences import (
    blank_batch,
    divisors_of,
    drawn_pairs,
    full_logprobs,
    gradient,
    head_logprobs,
    in_place,
    labelled_batch,
    loss_of,
    over_full_logits,
    pairs_batch,
    through_the_seam,
    with_reference,
)

Batches = list[dict[str, Tensor]]
WIDE = torch.float64
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", {}),
    "dpo smoothed": ("dpo", {"label_smoothing": 0.2, "beta": 0.3}),
    "dpo normalized with sft": ("dpo", {"length_normalized": True, "sft_weight": 0.5}),
    "ipo": ("ipo", {"beta": 0.5}),
    "ipo with sft": ("ipo", {"sft_weight": 0.1}),
    "orpo": ("orpo", {"beta": 0.5}),
    "simpo": ("simpo", {}),
    "simpo with sft": ("simpo", {"sft_weight": 0.3}),
    "kto": ("kto", {"desirable_weight": 1.3, "undesirable_weight": 0.7}),
}
PAIRED = [name for name, (kind, _) in KINDS.items() if kind != "kto"]
COMPARED = ("dpo", "ipo", "kto")  # with a reference


def made(name: str) -> Objective:
    kind, settings = KINDS[name]
    return build_objective(kind, **settings)


def cut(name: str, sizes: tuple[int, ...], *, packed: bool = False) -> Batches:
    """Four pairs, or their answers as labelled rows, with weights, in micro-batches of so many pairs."""
    pairs, weights, batches, at = drawn_pairs(4, vocab=VOCAB), [1.0, 2.0, 0.5, 1.0], [], 0
    for size in sizes:
        some = range(at, at + size)
        if name == "kto":
            rows = [(pairs[n][0], pairs[n][1 + side], side == 0) for n in some for side in (0, 1)]
            each = [weights[n] for n in some for _ in (0, 1)]
            batches.append(labelled_batch(rows, packed=packed, weights=each, baseline=0.4))
        else:
            batches.append(pairs_batch([pairs[n] for n in some], packed=packed, weights=[weights[n] for n in some]))
        at += size
    return batches


def compared(name: str, batches: Batches, *, dtype: torch.dtype = WIDE, shape: str = SECOND) -> Batches:
    """With another model of the same shape for the reference, where one is needed."""
    if not made(name).needs_reference:
        return batches
    other = ours(shape, seed=1, dtype=dtype)
    return [with_reference(other, batch) for batch in batches]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("shape", [FIRST, SECOND], ids=["no cap", "cap 30"])
@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_those_of_autograd_over_full_logits(name: str, shape: str, packed: bool) -> None:
    """In two micro-batches and a blank one; in float64 to its rounding, in float32 to its."""
    for dtype, near in ((WIDE, 1e-10), (torch.float32, 1e-4)):
        model = ours(shape, dtype=dtype)
        assert model.model.numerics.final_softcap == {FIRST: None, SECOND: 30.0}[shape]
        batches = compared(name, cut(name, (3, 1), packed=packed), dtype=dtype, shape=shape)
        batches.append(blank_batch(batches[0]))
        wanted, slope = over_full_logits(model, batches, made(name))
        found, given = through_the_seam(model, batches, made(name))
        assert found == pytest.approx(wanted, rel=near)
        assert slope.abs().max() > 1e-4
        assert (given - slope).abs().max() <= near * slope.abs().max()


@pytest.mark.parametrize("name", KINDS)
def test_no_cut_of_a_step_changes_it(name: str) -> None:
    """4 x 1 = 2 x 2 = 3 + 1 = 4, padded or packed: loss, gradient and figures, in float64."""
    model, results = ours(SECOND, dtype=WIDE), []
    for sizes in ((4,), (1, 1, 1, 1), (2, 2), (3, 1)):
        for packed in (False, True):
            batches = compared(name, cut(name, sizes, packed=packed))
            loss, slope = through_the_seam(model, batches, made(name))
            found = [made(name).figures(full_logprobs(model, batch), batch) for batch in batches]
            figures = {key: [sum(one[key][at] for one in found) for at in (0, 1)] for key in found[0]}
            results.append((loss, slope.clone(), figures))
    (loss, slope, figures), *others = results
    for other_loss, other_slope, other_figures in others:
        assert other_loss == pytest.approx(loss, rel=1e-10, abs=0)
        assert (other_slope - slope).abs().max() <= 1e-10 * slope.abs().max()
        assert other_figures == {key: pytest.approx(value, rel=1e-8) for key, value in figures.items()}


@pytest.mark.parametrize("name", KINDS)
def test_a_row_of_weight_two_is_the_row_twice(name: str) -> None:
    model = ours(SECOND, dtype=WIDE)
    (batch,) = compared(name, cut(name, (4,)))
    once = [row for pair in ((0, 1), (2, 3)) for row in pair]
    twice = [0, 1, *once]
    flat = {"row_weights": torch.tensor([2.0, 1.0] if name != "kto" else [2.0, 2.0, 1.0, 1.0])}
    ones = {"row_weights": torch.ones(3 if name != "kto" else 6)}
    weighted, repeated = {**rows_of(batch, once), **flat}, {**rows_of(batch, twice), **ones}
    wanted, slope = through_the_seam(model, [repeated], made(name))
    found, given = through_the_seam(model, [weighted], made(name))
    assert found == pytest.approx(wanted, rel=1e-10)
    assert (given - slope).abs().max() <= 1e-10 * slope.abs().max()


def rows_of(batch: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    """Sequences of a padded batch, each with one answer, in this order."""
    kept = {name: tensor[rows] for name, tensor in batch.items() if tensor.dim() and len(tensor) == len(batch["sides"])}
    numbers = torch.arange(len(rows))[:, None]
    return {**batch, **kept, "answer_ids": torch.where(kept["answer_ids"] >= 0, numbers, -1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "settings", "start"),
    [
        ("dpo", {}, math.log(2)),
        ("dpo", {"label_smoothing": 0.3}, math.log(2)),
        ("dpo", {"length_normalized": True}, math.log(2)),
        ("ipo", {}, 25.0),
        ("ipo", {"beta": 0.5}, 1.0),
        ("kto", {}, 0.5),
        ("kto", {"desirable_weight": 2.0, "undesirable_weight": 1.0}, 0.5 * 1.5),
    ],
)
def test_where_the_model_is_its_reference(
    kind: str, settings: dict[str, Any], start: float, dtype: torch.dtype
) -> None:
    """The loss is what it is told to be, and each reward, margin and the KL are exactly 0; a tie is half right."""
    model, objective = ours(SECOND, dtype=dtype), build_objective(kind, **settings)
    (batch,) = cut(kind, (4,))
    batch = with_reference(model, {**batch, "kl_baseline": torch.zeros(())})
    loss, _ = through_the_seam(model, [batch], objective)
    told = objective.loss_at_start(batch)
    assert told is not None
    assert loss == pytest.approx(told / objective.divisors(batch)[0], rel=1e-12)
    assert loss == pytest.approx(start, rel=1e-12)
    figures = objective.figures(head_logprobs(model, batch), batch)
    zero = {name for name in figures if name.startswith("rewards/") or name == "kl"} - {"rewards/accuracies"}
    assert {figures[name][0] for name in zero} == {0.0}
    if kind != "kto":
        assert figures["rewards/accuracies"] == (2.0, 4.0)


@pytest.mark.parametrize(("kind", "loss"), [("orpo", None), ("simpo", None), ("sft", None)])
def test_of_an_objective_without_a_reference_no_start_is_known(kind: str, loss: None) -> None:
    objective = build_objective(kind)
    assert not objective.needs_reference
    assert objective.loss_at_start(cut("dpo", (1,))[0]) is loss


def test_a_zero_head_starts_at_log_2_or_at_what_the_margins_say() -> None:
    objective = build_objective("reward")
    for margins, start in (([0.0, 0.0], math.log(2)), ([1.0, 0.0], (math.log1p(math.e) + math.log(2)) / 2)):
        batch = pairs_batch(drawn_pairs(2, vocab=VOCAB), margins=margins)
        assert float(loss_of(objective, torch.zeros(4), batch)) == pytest.approx(start, rel=1e-12)
        assert objective.loss_at_start(batch) == pytest.approx(2 * start, rel=1e-12)


def test_dpo_starts_with_the_gradient_of_the_difference() -> None:
    """-beta/2 (grad log p(chosen) - grad log p(rejected)), a mean over pairs."""
    model = ours(SECOND, dtype=WIDE)
    (batch,) = [with_reference(model, one) for one in cut("dpo", (4,))]
    batch["row_weights"] = torch.ones(4)
    _, given = through_the_seam(model, [batch], build_objective("dpo", beta=0.3))
    model.zero_grad()
    chosen, rejected = halves(summed_logprobs(full_logprobs(model, batch), batch))
    (-0.3 / 2 * (chosen - rejected)).mean().backward()
    assert (given - gradient(model)).abs().max() <= 1e-10 * given.abs().max()


@pytest.mark.parametrize("name", PAIRED)
def test_swapping_the_halves_negates_the_margin(name: str) -> None:
    objective, model = made(name), ours(SECOND, dtype=WIDE)
    (batch,) = compared(name, cut(name, (4,)))
    order = [answer ^ 1 for answer in range(8)]
    swapped = rows_of(batch, order)
    here = objective.figures(full_logprobs(model, batch), batch)
    there = objective.figures(full_logprobs(model, swapped), swapped)
    assert there["rewards/margins"][0] == pytest.approx(-here["rewards/margins"][0])
    assert there["rewards/chosen"][0] == pytest.approx(here["rewards/rejected"][0])
    assert there["rewards/accuracies"][0] == pytest.approx(4 - here["rewards/accuracies"][0])


def test_swapping_rewards_negates_the_margin() -> None:
    batch, rewards = pairs_batch(drawn_pairs(2, vocab=VOCAB)), torch.tensor([1.0, -2.0, 0.5, 3.0])
    figures = build_objective("reward").figures(rewards, batch)
    swapped = build_objective("reward").figures(rewards[[1, 0, 3, 2]], batch)
    assert (figures["rewards/margins"], swapped["rewards/margins"]) == ((0.5, 2.0), (-0.5, 2.0))


@pytest.mark.parametrize("kind", ["dpo", "simpo", "orpo"])
def test_a_pair_of_equal_answers_teaches_nothing(kind: str) -> None:
    """log 2 with a gradient of exactly 0 by its log-probabilities; of ORPO in the term of the pair."""
    settings = {"simpo": {"gamma": 0.0}, "orpo": {"beta": 1.0}}.get(kind, {})
    model, objective = ours(SECOND, dtype=WIDE), build_objective(kind, **settings)
    batch = pairs_batch([([2, 9], [5, 6, 7], [5, 6, 7])])
    if objective.needs_reference:
        batch = with_reference(ours(SECOND, seed=1, dtype=WIDE), batch)
    logprobs = full_logprobs(model, batch).detach().requires_grad_()
    first = objective(logprobs, batch)[0]
    assert float(first.detach()) == pytest.approx(math.log(2), rel=1e-12)
    (slope,) = torch.autograd.grad(first, logprobs)
    assert float((slope[0] + slope[1]).abs().max()) < 1e-15  # what one half is told, the other is told against
    if kind == "orpo":
        return
    _, given = through_the_seam(model, [batch], objective)
    _, alone = through_the_seam(model, [pairs_batch([([2, 9], [5, 6, 7], [8, 6, 7])])], build_objective("simpo"))
    assert given.abs().max() <= 1e-12 * alone.abs().max()


def test_ties_count_half_and_nothing_else_does() -> None:
    batch = pairs_batch([([2], [5], [6])] * 3)
    batch["reference_logprobs"] = torch.zeros(6)
    logprobs = in_place(batch, [[-1.0], [-1.0], [-1.0], [-2.0], [-2.0], [-1.0]])
    assert build_objective("dpo").figures(logprobs, batch)["rewards/accuracies"] == (1.5, 3.0)
    assert build_objective("reward").figures(torch.zeros(6), batch)["rewards/accuracies"] == (1.5, 3.0)


@pytest.mark.parametrize(
    ("objective", "settings"), [("orpo", {"beta": 0.0}), ("dpo", {"beta": 0.0, "sft_weight": 1.0})]
)
def test_with_no_weight_on_pairs_it_is_supervised_fine_tuning_of_the_chosen_answers(
    objective: str, settings: dict[str, Any]
) -> None:
    """Each token's weight to the bit, also in the gradient; in float32 the same mean over the tokens of the step."""
    (batch,) = cut("dpo", (4,))
    batch["reference_logprobs"] = torch.zeros(8)
    chosen = rows_of(batch, [0, 2, 4, 6])
    weights = batch["row_weights"][:, None].expand_as(chosen["labels"])
    alone = {**chosen, "loss_weights": weights}
    model = ours(SECOND)
    logprobs = full_logprobs(model, batch).detach()
    found, sft = build_objective(objective, **settings), SupervisedFineTuning()
    value, given = token_weights(found, logprobs, batch, divisors_of(found, [batch]))
    wanted, expected = token_weights(sft, logprobs[::2], alone, divisors_of(sft, [alone]))
    more = math.log(2) if objective == "dpo" else 0.0
    assert float(value) == pytest.approx(float(wanted) + more, rel=1e-6)
    labelled = chosen["labels"] != -100
    assert torch.equal(given[::2][labelled], expected[labelled])
    assert given[1::2].abs().max() == 0


def test_log_odds_are_exact_and_flat_above_the_limit() -> None:
    """Against 60 digits of decimals, for a in [-100, -1e-6]; from there on the value and the gradient of a constant."""
    from decimal import Decimal, localcontext

    values = [-100.0, -50.0, -10.0, -1.0, -0.7, -math.log(2), -0.69, -0.1, -1e-3, -1e-5, -1e-6]
    a = torch.tensor(values, dtype=WIDE, requires_grad=True)
    found = log_odds(a)
    (slope,) = torch.autograd.grad(found.sum(), a)
    with localcontext() as context:
        context.prec = 60
        odds = [Decimal(value) - (1 - Decimal(value).exp()).ln() for value in values]
        rises = [1 / (1 - Decimal(value).exp()) for value in values]
    assert found.tolist() == pytest.approx([float(one) for one in odds], rel=1e-13)
    assert slope.tolist() == pytest.approx([float(one) for one in rises], rel=1e-10)
    sure = torch.tensor([-9e-7, -1e-9, -1e-20, 0.0], dtype=WIDE, requires_grad=True)
    flat = log_odds(sure)
    assert torch.equal(flat, log_odds(torch.tensor(SURE, dtype=WIDE)).expand(4))
    assert torch.equal(torch.autograd.grad(flat.sum(), sure)[0], torch.zeros(4, dtype=WIDE))


def test_simpo_does_not_see_how_long_an_answer_is() -> None:
    """Twice the tokens of the same log-probabilities."""
    objective = build_objective("simpo")
    short = pairs_batch([([2], [5, 6], [7])])
    long = pairs_batch([([2], [5, 6, 5, 6], [7])])
    values = [
        loss_of(objective, in_place(batch, [chosen, [-1.5]]), batch)
        for batch, chosen in ((short, [-0.3, -0.9]), (long, [-0.3, -0.9] * 2))
    ]
    assert values[0] == values[1]


def test_kto_mirrors_a_good_answer_in_a_bad_one_about_z() -> None:
    """A good answer z + x ahead is a bad one x behind it; and no order of rows matters."""
    objective = build_objective("kto", beta=0.7)

    def one(good: bool, ahead: float) -> Tensor:
        batch = labelled_batch([([2], [5], good)], baseline=0.25)
        batch["reference_logprobs"] = torch.tensor([-3.0], dtype=WIDE)
        return loss_of(objective, in_place(batch, [[-3.0 + 0.25 + ahead]]), batch)

    for ahead in (-2.0, 0.0, 0.5):
        assert one(True, ahead) == pytest.approx(float(one(False, -ahead)), rel=1e-14)
        assert one(True, ahead) == pytest.approx(1 - 1 / (1 + math.exp(-0.7 * ahead)), rel=1e-12)
    model = ours(SECOND, dtype=WIDE)
    (batch,) = compared("kto", cut("kto", (4,)))
    order = [5, 2, 7, 0, 1, 6, 3, 4]
    (here, slope), (there, other) = (
        through_the_seam(model, [rows], made("kto")) for rows in (batch, rows_of(batch, order))
    )
    assert there == pytest.approx(here, rel=1e-12)
    assert (other - slope).abs().max() <= 1e-10 * slope.abs().max()


def test_reward_gradients_are_those_of_autograd_in_any_cut() -> None:
    """Rewards in place of log-probabilities: minus the derivative by each, each term over its divisor."""
    rewards = torch.tensor([1.0, -0.5, 0.3, 0.9, 2.0, 2.0, -1.0, 0.1], dtype=WIDE)
    margins, weights = torch.tensor([0.0, 0.5, 0.0, 1.0], dtype=WIDE), torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=WIDE)
    given = rewards.clone().requires_grad_()
    chosen, rejected = halves(given)
    each = -logsigmoid(chosen - rejected - margins) + 0.01 * (chosen + rejected) ** 2
    ((each * weights).sum() / weights.sum()).backward()
    objective = build_objective("reward")
    for sizes in ((4,), (3, 1), (1, 1, 1, 1)):
        at, batches = 0, []
        for size in sizes:
            batch = pairs_batch([([2], [5], [6])] * size)
            batches.append({**batch, "margins": margins[at : at + size], "row_weights": weights[at : at + size]})
            at += size
        divisors, parts = divisors_of(objective, batches), rewards.split([2 * size for size in sizes])
        found = [token_weights(objective, part, one, divisors) for part, one in zip(parts, batches, strict=True)]
        assert torch.allclose(torch.cat([slope for _, slope in found]), -given.grad, rtol=1e-12)


def test_a_blank_micro_batch_is_nothing_in_every_objective() -> None:
    for name in KINDS:
        (batch,) = compared(name, cut(name, (1,)))
        blank, objective = blank_batch(batch), made(name)
        assert set(objective.divisors(blank)) == {0.0}
        value, weights = token_weights(objective, torch.zeros(1, 1), blank, torch.ones(len(objective.divisors(blank))))
        assert (float(value), weights.tolist()) == (0.0, [[0.0]])
        full = objective.figures(torch.zeros(batch["labels"].shape), batch)
        assert objective.figures(torch.zeros(1, 1), blank) == dict.fromkeys(full, (0.0, 0.0))


def test_what_each_objective_asks_for() -> None:
    asked: dict[str, Callable[[Objective], Any]] = {
        "rows": lambda one: one.rows,
        "reference": lambda one: one.needs_reference,
        "baseline": lambda one: one.needs_baseline,
        "scores": lambda one: one.scores,
    }
    kinds = ("sft", "dpo", "ipo", "orpo", "simpo", "kto", "reward")
    assert {kind: [what(build_objective(kind)) for what in asked.values()] for kind in kinds} == {
        "sft": ["answers", False, False, False],
        "dpo": ["pairs", True, False, False],
        "ipo": ["pairs", True, False, False],
        "orpo": ["pairs", False, False, False],
        "simpo": ["pairs", False, False, False],
        "kto": ["labelled", True, True, False],
        "reward": ["pairs", False, False, True],
    }
