"""Faults that other toolkits had in losses over pairs; their numbers are those of the list in docs/numerics.md."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from gemma_ft.train.micro_batch import micro_batch_loss, token_weights
from gemma_ft.train.objectives.orpo import SURE
from gemma_ft.train.objectives.registry import Batch, Figures, Objective, build_objective
from tests.parity.amplified import SECOND, VOCAB, ours
from tests.train.preferences import (
    divisors_of,
    drawn_pairs,
    full_logprobs,
    gradient,
    head_logprobs,
    in_place,
    labelled_batch,
    loss_of,
    pairs_batch,
    through_the_seam,
    with_reference,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.3, "label_smoothing": 0.2, "length_normalized": True, "sft_weight": 0.5},
    "ipo": {"beta": 0.3, "sft_weight": 0.5},
    "orpo": {"beta": 0.3},
    "simpo": {"beta": 1.0, "gamma": 0.2, "sft_weight": 0.5},
    "kto": {"beta": 0.3, "desirable_weight": 2.0, "undesirable_weight": 0.5},
    "reward": {"centering": 0.3},
}


def batch_for(objective: Objective) -> dict[str, Tensor]:
    pairs = drawn_pairs(2, vocab=VOCAB)
    if objective.rows == "pairs":
        return pairs_batch(pairs, margins=[0.5, 0.0])
    rows = [(prompt, answer, answer is chosen) for prompt, chosen, rejected in pairs for answer in (chosen, rejected)]
    return labelled_batch(rows, baseline=0.3)


class Kept:
    """An objective that keeps the log-probabilities that it was given."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.kept = objective, list[Tensor]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objective, name)

    def __call__(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        self.kept.append(logprobs.detach())
        return self.objective(logprobs, batch)


def test_fault_p1_the_cap_is_c_tanh_x_over_c_far_beyond_it() -> None:
    """Logits of several times the cap: none is beyond it, so that no log-probability is below -(2c + log V)."""
    model = ours(SECOND, dtype=torch.float64)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    batch = pairs_batch(drawn_pairs(4, vocab=VOCAB))
    hidden = model.model(
        input_ids=batch["input_ids"], document_ids=batch["document_ids"], position_ids=batch["position_ids"]
    ).last_hidden_state
    raw = hidden @ model.lm_head.weight.T
    assert raw.abs().max() > 3 * 30
    expected = (30 * torch.tanh(raw / 30)).log_softmax(-1)
    wrong = (raw * torch.tanh(raw / 30)).log_softmax(-1)
    found, labelled = head_logprobs(model, batch), batch["labels"] != -100
    targets = batch["labels"][:, 1:].clamp(min=0)[..., None]
    kept, other = (one[:, :-1].gather(2, targets)[..., 0][labelled[:, 1:]] for one in (expected, wrong))
    assert torch.allclose(found[labelled], kept, rtol=1e-10)
    assert found.min() >= -(2 * 30 + torch.tensor(float(VOCAB)).log())
    assert other.min() < -100


@pytest.mark.parametrize(("kind", "setting"), [(kind, name) for kind, some in SETTINGS.items() for name in some])
def test_fault_p4_every_setting_is_in_the_loss(kind: str, setting: str) -> None:
    """A second copy of a loss drops what the first one has: there is one of each, and each of its settings counts."""
    plain = build_objective(kind)
    batch = batch_for(plain)
    given = torch.randn(4, generator=torch.Generator().manual_seed(1)).double()
    if not plain.scores:
        model = ours(SECOND, dtype=torch.float64)
        batch, given = with_reference(ours(SECOND, seed=1, dtype=torch.float64), batch), head_logprobs(model, batch)
    changed = build_objective(kind, **{setting: SETTINGS[kind][setting]})
    assert abs(float(loss_of(changed, given, batch) - loss_of(plain, given, batch))) > 1e-3


@pytest.mark.parametrize("kind", ["dpo", "ipo", "kto"])
def test_fault_p4_the_reference_and_the_weights_of_rows_are_in_the_loss(kind: str) -> None:
    objective, model = build_objective(kind), ours(SECOND, dtype=torch.float64)
    batch = batch_for(objective)
    logprobs = head_logprobs(model, batch)
    same, other = (with_reference(one, batch) for one in (model, ours(SECOND, seed=1, dtype=torch.float64)))
    values = [float(loss_of(objective, logprobs, one)) for one in (same, other)]
    weighted = {**other, "row_weights": torch.linspace(0.5, 2, len(batch["row_weights"]))}
    assert abs(values[0] - values[1]) > 1e-3
    assert abs(values[1] - float(loss_of(objective, logprobs, weighted))) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fault_p5_log_probabilities_of_a_reference_pass_are_those_of_the_training_pass_to_the_bit(
    dtype: torch.dtype,
) -> None:
    """In eval mode and without a gradient, or in training: one head, one order of sums."""
    model, batch = ours(SECOND, dtype=dtype), pairs_batch(drawn_pairs(4, vocab=VOCAB))
    batch = with_reference(model, batch)
    objective = Kept(build_objective("dpo"))
    micro_batch_loss(model.train(), batch, objective, torch.tensor([4.0], dtype=torch.float64))
    assert torch.equal(objective.kept[0], head_logprobs(model, batch))
    assert objective.figures(objective.kept[0], batch)["kl"] == (0.0, 8.0)


def test_fault_p8_odds_of_a_sure_answer_are_no_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """log(1 - e^a) at a = 0, and where float32's e^a is 1: a loss, a gradient, and a count of such answers. TRL's ORPO
    computes both branches of one `where` without a clamp: its gradient is NaN there.
    """
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo.orpo_trainer import log1mexp

    objective = build_objective("orpo")
    batch = pairs_batch([([2], [5, 6], [7, 8])] * 3)
    sure = [[0.0, 0.0], [-1.0, -1.0], [-1e-9, -1e-9], [0.0, -2.0], [-0.4, -0.6], [-1e-8, 0.0]]
    logprobs = in_place(batch, sure, torch.float32)
    value, weights = token_weights(objective, logprobs, batch, divisors_of(objective, [batch]))
    assert value.isfinite()
    assert weights.isfinite().all()
    labelled = batch["labels"] != -100
    assert (weights[::2][labelled[::2]] > 0).all()  # of the chosen ones the cross-entropy at least
    assert SURE < -1e-8 / 2
    assert (weights[5] == 0).all()  # a sure rejected one is flat
    assert objective.figures(logprobs, batch)["log_odds_clamped"] == (3.0, 6.0)
    a = torch.tensor([-1e-9], requires_grad=True)
    log1mexp(a).sum().backward()
    assert a.grad.isnan().all()


def test_fault_p9_both_terms_of_orpo_have_a_gradient() -> None:
    """The log-probabilities are inside what is differentiated: chosen tokens rise by more than the cross-entropy
    alone says, rejected ones fall; and the weights of the model move by both terms.
    """
    model, batch = ours(SECOND, dtype=torch.float64), pairs_batch(drawn_pairs(2, vocab=VOCAB))
    objective, none = build_objective("orpo", beta=1.0), build_objective("orpo", beta=0.0)
    logprobs, labelled = head_logprobs(model, batch), batch["labels"] != -100
    divisors = divisors_of(objective, [batch])
    _, weights = token_weights(objective, logprobs, batch, divisors)
    assert (weights[::2][labelled[::2]] > 1 / divisors[1]).all()
    assert (weights[1::2][labelled[1::2]] < 0).all()
    _, both = through_the_seam(model, [batch], objective)
    _, nll = through_the_seam(model, [batch], none)
    assert nll.abs().max() > 1e-3
    assert (both - nll).abs().max() > 1e-3
    model.zero_grad()
    loss_of(objective, full_logprobs(model, batch), batch).backward()
    assert (both - gradient(model)).abs().max() <= 1e-10 * both.abs().max()


def test_fault_p12_one_forward_has_one_backward_also_where_activations_are_recomputed() -> None:
    """Both halves are in one pass: nothing that a pass keeps is overwritten by another before its backward. A pass of
    the reference before it, without a gradient, changes nothing.
    """
    batch, objective = pairs_batch(drawn_pairs(2, vocab=VOCAB)), build_objective("dpo")
    batch = with_reference(ours(SECOND, seed=1), batch)
    model, recomputing = ours(SECOND), ours(SECOND)
    recomputing.gradient_checkpointing_enable({"use_reentrant": False})
    calls: list[bool] = []
    for one in (model, recomputing):
        one.model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    loss, slope = through_the_seam(model, [batch], objective)
    assert calls == [True]
    head_logprobs(recomputing, batch)
    assert calls == [True, False]
    recomputed, again = through_the_seam(recomputing, [batch], objective)
    assert calls == [True, False, True]
    assert recomputed == loss
    assert torch.equal(again, slope)


def test_fault_p21_a_reference_is_one_number_per_answer() -> None:
    """An objective has no model: what it knows of its reference is `reference_logprobs` [A], from wherever."""
    model, frozen = ours(SECOND, dtype=torch.float64), ours(SECOND, seed=1, dtype=torch.float64)
    batch = pairs_batch(drawn_pairs(3, vocab=VOCAB))
    live = with_reference(frozen, batch)
    assert live["reference_logprobs"].shape == (6,)
    numbers = copy.deepcopy(live["reference_logprobs"].tolist())
    del frozen
    stored = {**batch, "reference_logprobs": torch.tensor(numbers, dtype=torch.float64)}
    for kind in ("dpo", "ipo"):
        (here, slope), (there, other) = (
            through_the_seam(model, [one], build_objective(kind)) for one in (live, stored)
        )
        assert here == there
        assert torch.equal(slope, other)


@pytest.mark.parametrize("kind", ["dpo", "ipo", "simpo", "orpo"])
def test_fault_p22_rewards_computed_again_are_those_of_the_run(kind: str) -> None:
    """In eval mode, each pair alone, in another order and width of padding: what was told of the step."""
    objective, model, reference = build_objective(kind), ours(SECOND), ours(SECOND, seed=1)
    pairs = drawn_pairs(4, vocab=VOCAB)
    whole = with_reference(reference, pairs_batch(pairs, packed=True))
    told = Kept(objective)
    micro_batch_loss(model.train(), whole, told, torch.ones(len(objective.divisors(whole)), dtype=torch.float64))
    logged: Figures = objective.figures(told.kept[0], whole)
    again: dict[str, list[float]] = {}
    for pair in reversed(pairs):
        one = with_reference(reference, pairs_batch([pair]))
        for name, (value, count) in objective.figures(head_logprobs(model, one), one).items():
            sums = again.setdefault(name, [0.0, 0.0])
            again[name] = [sums[0] + value, sums[1] + count]
    assert again == {name: pytest.approx(list(figure), rel=1e-5, abs=1e-5) for name, figure in logged.items()}
