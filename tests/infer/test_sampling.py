"""The scores that are drawn from equal transformers', draws follow them, and settings out of range are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from gemma_ft.errors import UserError
from gemma_ft.infer.sampling import Sampler, Sampling, next_tokens
from tests.parity.amplified import SECOND, reference

VOCAB = 101
CPU = torch.device("cpu")
PROMPT = [5, 9, 9, 70]


def logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return 4 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def sampler(prompt: list[int] | None = None, **settings: Any) -> Sampler:
    return Sampler(Sampling(**settings), PROMPT if prompt is None else prompt, 8, CPU)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 0.9, "min_p": 0.1},
        {"temperature": 1.0, "repetition_penalty": 1.3},
        {"temperature": 1.7, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 0.8},
        {"temperature": 1.0, "top_k": 1000, "top_p": 0.0},
    ],
    ids=str,
)
def test_scores_equal_those_of_transformers_generate(settings: dict[str, Any]) -> None:
    """Against the chain that its `generate` itself builds, so that the order is compared too."""
    ours = sampler(**settings)
    for token in (70, 12):
        ours.append(token)
    stock = reference(SECOND)
    config = GenerationConfig(do_sample=True, **settings)
    chain = stock._get_logits_processor(generation_config=config, input_ids_seq_length=len(PROMPT), device="cpu")
    expected = chain(torch.tensor([[*PROMPT, 70, 12]]), logits())
    assert torch.equal(ours.scores(logits()), expected)
    assert not torch.equal(expected, logits())


def test_temperature_zero_takes_the_most_likely_token() -> None:
    best = int(logits().argmax())
    assert next_tokens(logits(), [sampler()]).tolist() == [best]
    assert next_tokens(logits(), [sampler(top_k=3, top_p=0.5, min_p=0.9, seed=4)]).tolist() == [best]


def test_a_penalty_moves_the_greedy_choice_too_over_prompt_and_answer() -> None:
    row = logits()
    first, second = (int(token) for token in row.topk(2).indices[0])
    assert next_tokens(row, [sampler([first], repetition_penalty=5.0)]).tolist() == [second]
    said = sampler([4], repetition_penalty=5.0)
    assert next_tokens(row, [said]).tolist() == [first]
    said.append(first)
    assert next_tokens(row, [said]).tolist() == [second]


def test_draws_follow_the_scores() -> None:
    row = torch.log(torch.tensor([[0.5, 0.0, 0.3, 0.2]]))
    one = sampler([0], temperature=1.0, seed=0)
    counts = torch.bincount(torch.cat([next_tokens(row, [one]) for _ in range(4000)]), minlength=4) / 4000
    assert counts[1] == 0
    assert torch.allclose(counts, row[0].exp(), atol=0.03)


def test_what_may_not_be_drawn_never_is() -> None:
    row = logits()
    allowed = set(row.topk(3).indices[0].tolist())
    one = sampler(temperature=50.0, top_k=3, seed=1)
    assert {int(next_tokens(row, [one])) for _ in range(300)} == allowed


def test_each_row_draws_from_its_own_generator() -> None:
    rows = logits(3)
    settings = [{"temperature": 2.0, "seed": 7}, {}, {"temperature": 2.0, "seed": 8}]
    together = [sampler(**one) for one in settings]
    apart = [sampler(**one) for one in settings]
    for _ in range(20):
        found = next_tokens(rows, together).tolist()
        assert found == [int(next_tokens(rows[i : i + 1], [apart[i]])) for i in range(3)]


def test_no_seed_means_another_draw_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each generator is seeded with what the system gives, here 7, then 8."""
    given = iter((7, 8))

    class Generator(torch.Generator):
        def seed(self) -> int:
            return self.manual_seed(next(given)).initial_seed()

    monkeypatch.setattr(torch, "Generator", Generator)
    for seed in (7, 8):
        drawn, expected = sampler(temperature=1.0), sampler(temperature=1.0, seed=seed)
        assert [drawn.uniform() for _ in range(4)] == [expected.uniform() for _ in range(4)]
    assert list(given) == []


def test_logits_that_are_not_finite_give_no_token() -> None:
    rows = logits(3)
    rows[0, 3], rows[1, 4] = float("nan"), float("inf")
    for settings in ({}, {"temperature": 1.0, "top_p": 0.9}):
        found = next_tokens(rows, [sampler(**settings) for _ in range(3)]).tolist()
        assert found[:2] == [-1, -1]
        assert found[2] >= 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature: expected 0 to 100, got -1"),
        ({"temperature": float("nan")}, "temperature: expected 0 to 100, got nan"),
        ({"temperature": "hot"}, "temperature: expected 0 to 100, got 'hot'"),
        ({"top_k": 2.5}, "top_k: expected a whole number from 0 to 2147483647, got 2.5"),
        ({"top_p": 1.1}, "top_p: expected 0 to 1, got 1.1"),
        ({"min_p": True}, "min_p: expected 0 to 1, got True"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected 0.01 to 100, got 0"),
        ({"seed": -3}, "seed: expected a whole number from 0 to 9223372036854775807, got -3"),
    ],
)
def test_settings_out_of_range_are_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        Sampling(**settings)
    assert str(raised.value) == message


@pytest.mark.parametrize("temperature", [1e-7, 1e-38, 1e-40])
def test_a_temperature_too_small_to_divide_by_is_greedy(temperature: float) -> None:
    one = sampler(temperature=temperature, top_p=0.9, seed=3)
    assert one.greedy
    assert next_tokens(logits(), [one]).tolist() == [int(logits().argmax())]


def test_nothing_is_drawn_from_weights_that_are_not_finite() -> None:
    """Finite logits that the temperature makes infinite are told like damaged ones."""
    assert next_tokens(logits() * 1e36, [sampler(temperature=1e-4, seed=3)]).tolist() == [-1]
