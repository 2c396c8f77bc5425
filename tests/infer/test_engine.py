"""Continuous batching: what a request gets depends on nothing but itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_ft.infer.engine import Emitted, Engine, Request
from gemma_ft.infer.sampling import Sampling
from gemma_ft.model.gemma import GemmaForCausalLM
from tests.infer.lively import lively, lively_reference
from tests.parity.amplified import FIRST, SECOND, SHAPES, WINDOW, relative, token_rows

LENGTHS = (13, 8, 2, 21, 1, 9)  # below, at and over the window
NEW = 14  # past the wrap for every one of them but the last few
DRAWN = Sampling(temperature=1.3, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.1)


@cache
def model_of(shape: str) -> GemmaForCausalLM:
    """One float32 model per shape for all tests here: the engine changes nothing in it."""
    return lively(shape)


def prompts() -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(token_rows(len(LENGTHS)), LENGTHS, strict=True)]


@dataclass
class Heard:
    """What an engine gave each ticket."""

    ids: dict[int, list[int]] = field(default_factory=dict)
    finish: dict[int, str] = field(default_factory=dict)

    def note(self, emitted: Sequence[Emitted]) -> None:
        assert len({one.ticket for one in emitted}) == len(emitted), "one token for each at the most"
        for one in emitted:
            assert one.ticket not in self.finish, "nothing comes after the end"
            assert (one.token_id is None) == (one.finish == "stop")
            said = self.ids.setdefault(one.ticket, [])
            if one.token_id is not None:
                said.append(one.token_id)
            if one.finish is not None:
                self.finish[one.ticket] = one.finish


def run(engine: Engine, heard: Heard | None = None) -> Heard:
    """Step until nobody speaks or waits."""
    heard = heard or Heard()
    for _ in range(1000):
        if not engine.active and not engine.waiting:
            return heard
        heard.note(engine.step())
    raise AssertionError("the engine never came to an end")


def alone(model: Any, request: Request, stop_ids: Sequence[int] = ()) -> list[int]:
    """What one request gets from an engine of its own."""
    engine = Engine(model, stop_ids=stop_ids, max_batch=1)
    ticket = engine.submit(request)
    return run(engine).ids[ticket]


def by_transformers(model: Any, prompt: list[int], new: int = NEW, **options: Any) -> list[int]:
    """Greedy tokens of transformers' own model and loop."""
    ids = torch.tensor([prompt])
    wanted = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None, **options}
    out = model.generate(ids, max_new_tokens=new, **wanted)
    return out[0, len(prompt) :].tolist()


@cache
def answers_of_transformers(shape: str) -> list[list[int]]:
    """One for each of the prompts, each shorter by a token than the one before."""
    stock = lively_reference(shape)
    return [by_transformers(stock, prompt, NEW - i) for i, prompt in enumerate(prompts())]


@pytest.mark.parametrize("prefill_tokens", [512, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_equal_transformers(shape: str, prefill_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six prompts for four rows: some wait, join when others have left; read whole, or in pieces of five tokens."""
    monkeypatch.setattr("gemma_ft.infer.engine.PREFILL_TOKENS", prefill_tokens)
    engine = Engine(model_of(shape), stop_ids=(), max_batch=4)
    tickets = [engine.submit(Request(prompt, NEW - i)) for i, prompt in enumerate(prompts())]
    heard = run(engine)
    for ticket, expected in zip(tickets, answers_of_transformers(shape), strict=True):
        assert heard.ids[ticket] == expected
        assert heard.finish[ticket] == "length"


def test_rows_that_no_token_has_are_never_said() -> None:
    """From 4B on Gemma 3 has 262,208 rows for 262,145 tokens."""
    known = 40
    samplings = [Sampling(), Sampling(temperature=1.5, seed=3), Sampling(repetition_penalty=1.4), DRAWN]
    said: dict[int | None, list[int]] = {}
    for most in (None, known):
        engine = Engine(model_of(SECOND), stop_ids=(), max_batch=8, known_tokens=most)
        tickets = [engine.submit(Request(prompt, NEW, one)) for prompt in prompts() for one in samplings]
        heard = run(engine)
        said[most] = [token for ticket in tickets for token in heard.ids[ticket]]
    assert max(said[known]) < known <= max(said[None])
    model, prompt = model_of(SECOND), prompts()[0]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    assert said[known][0] == int(logits[:known].argmax())


ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, 12),  # steps before it comes
        st.integers(1, 20),  # tokens of its prompt
        st.integers(1, 16),  # new tokens
        st.sampled_from([Sampling(), Sampling(temperature=1.5, seed=3), Sampling(repetition_penalty=1.4)]),
        st.none() | st.integers(0, 12),  # steps after which it is cancelled
    ),
    min_size=1,
    max_size=7,
)


@pytest.mark.parametrize("shape", [FIRST, SECOND])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(arrivals=ARRIVALS, rows=st.integers(1, 4), prefill_tokens=st.sampled_from([3, 16, 512]))
def test_fault_25_whoever_comes_and_goes_each_gets_what_it_gets_alone(
    shape: str, arrivals: list[Any], rows: int, prefill_tokens: int
) -> None:
    model = model_of(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gemma_ft.infer.engine.PREFILL_TOKENS", prefill_tokens)
        engine, heard = Engine(model, stop_ids=[7, 11], max_batch=rows), Heard()
        requests, cancelled = {}, {}
        for step in range(200):
            for i, (when, length, new, sampling, stay) in enumerate(arrivals):
                if when == step:
                    prompt = token_rows(1, length, seed=i)[0].tolist()
                    ticket = engine.submit(Request(prompt, new, sampling))
                    requests[ticket] = Request(prompt, new, sampling)
                    if stay is not None:
                        cancelled[ticket] = step + stay
            for ticket in [ticket for ticket, at in cancelled.items() if at == step]:
                engine.cancel(ticket)
            heard.note(engine.step())
            assert engine.active <= rows
            if step > 24 and not engine.active and not engine.waiting:
                break
        for ticket, request in requests.items():
            expected = alone(model, request, [7, 11])
            said = heard.ids.get(ticket, [])
            assert said == expected if ticket in heard.finish else said == expected[: len(said)]
            assert ticket in heard.finish or ticket in cancelled


@pytest.mark.parametrize("shape", [FIRST, SECOND])
def test_the_same_seed_gives_the_same_text_alone_and_in_a_batch(shape: str) -> None:
    model = model_of(shape)
    engine = Engine(model, stop_ids=(), max_batch=6)
    draws = [Sampling(**{**vars(DRAWN), "seed": seed}) for seed in (1, 1, 2, 3, 4, 5)]
    requests = [Request(prompt, NEW, draw) for prompt, draw in zip([prompts()[0], *prompts()[:5]], draws, strict=True)]
    tickets = [engine.submit(request) for request in requests]
    heard = run(engine)
    for ticket, request in zip(tickets, requests, strict=True):
        assert heard.ids[ticket] == alone(model, request) == alone(model, request)
    first, twin, *_ = tickets
    assert heard.ids[first] == heard.ids[twin]
    assert len({tuple(alone(model, Request(prompts()[0], NEW, draw))) for draw in draws[1:]}) == 5


@pytest.mark.parametrize("shape", [FIRST, SECOND])
def test_a_stop_token_ends_an_answer_and_is_never_given(shape: str) -> None:
    model, prompt = model_of(shape), prompts()[0]
    free = alone(model, Request(prompt, NEW))
    stop = next(token for i, token in enumerate(free) if i > 3 and token not in free[:i])
    end = free.index(stop)
    for budget, finish in ((NEW, "stop"), (end + 1, "stop"), (end, "length")):
        engine = Engine(model, stop_ids=[stop, 1], max_batch=2)
        ticket = engine.submit(Request(prompt, budget))
        heard = run(engine)
        assert (heard.ids[ticket], heard.finish[ticket]) == (free[:end], finish)


def spy(model: GemmaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[int, ...]]]:
    """The shapes of the ids that go into the model, and of the states that meet the head."""
    seen: dict[str, list[tuple[int, ...]]] = {"ids": [], "head": []}

    def watched(method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(given: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            seen[name].append(tuple(given.shape))
            return method(given, *args, **kwargs)

        return call

    monkeypatch.setattr(model.model, "forward", watched(model.model.forward, "ids"))
    monkeypatch.setattr(model.lm_head, "forward", watched(model.lm_head.forward, "head"))
    return seen


def test_a_prompt_meets_the_head_with_its_last_position_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively(SECOND)
    seen = spy(model, monkeypatch)
    engine = Engine(model, stop_ids=(), max_batch=3)
    for prompt in prompts()[:3]:
        engine.submit(Request(prompt, 3))
    run(engine)
    assert seen["ids"] == [(3, 13), (3, 1), (3, 1)]
    assert seen["head"] == [(3, model.config.hidden_size)] * 3


def test_a_long_prompt_is_read_in_pieces_while_others_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma_ft.infer.engine.PREFILL_TOKENS", 16)
    model = lively(SECOND)
    seen = spy(model, monkeypatch)
    engine, heard = Engine(model, stop_ids=(), max_batch=3), Heard()
    first = engine.submit(Request([5, 6], 8))
    heard.note(engine.step())
    long = engine.submit(Request(token_rows(1, 40)[0].tolist(), 2))
    after = engine.submit(Request([9, 8, 7], 2))
    for _ in range(2):
        assert [one.ticket for one in engine.step()] == [first]
        assert (engine.active, engine.waiting) == (2, 1)
    assert [one.ticket for one in engine.step()] == [first, long]
    assert [one.ticket for one in engine.step()] == [first, long, after]
    assert seen["ids"] == [(1, 2), (1, 1), (1, 16), (1, 1), (1, 16), (1, 1), (1, 8), (2, 1), (1, 3)]


@pytest.mark.parametrize("shape", [FIRST, SECOND])
def test_in_bf16_cached_logits_are_as_near_the_truth_as_uncached_ones(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow, truth = lively(shape, dtype=torch.bfloat16), lively(shape, dtype=torch.float64)
    steps: list[torch.Tensor] = []
    head = narrow.head_logits
    monkeypatch.setattr(narrow, "head_logits", lambda hidden: steps.append(head(hidden)) or steps[-1])
    engine = Engine(narrow, stop_ids=(), max_batch=3)
    tickets = [engine.submit(Request(prompt, NEW)) for prompt in prompts()[:3]]
    heard = run(engine)
    monkeypatch.undo()
    cached, uncached, exact = [], [], []
    for row, (ticket, prompt) in enumerate(zip(tickets, prompts(), strict=False)):
        ids = torch.tensor([prompt + heard.ids[ticket]])
        cached += [step[row] for step in steps]
        with torch.no_grad():
            uncached.append(narrow(ids).logits[0, len(prompt) - 1 : -1])
            exact.append(truth(ids).logits[0, len(prompt) - 1 : -1])
    error = [relative(torch.cat(found), torch.cat(exact)) for found in ([torch.stack(cached)], uncached)]
    assert error[0] <= 1.5 * error[1]


def test_a_sequence_may_fill_the_cache_to_its_last_place() -> None:
    model = model_of(SECOND)
    request = Request(token_rows(1, 3 * WINDOW)[0].tolist(), 6)
    engine = Engine(model, stop_ids=(), max_batch=1, max_seq_len=3 * WINDOW + 6)
    ticket = engine.submit(request)
    assert run(engine).ids[ticket] == alone(model, request)


@pytest.mark.parametrize("shape", [FIRST, SECOND])
def test_a_penalty_counts_prompt_and_answer_as_in_transformers(shape: str) -> None:
    engine, stock, prompt = Engine(model_of(shape), stop_ids=()), lively_reference(shape), prompts()[0]
    ticket = engine.submit(Request(prompt, NEW, Sampling(repetition_penalty=1.8)))
    expected = by_transformers(stock, prompt, repetition_penalty=1.8)
    assert run(engine).ids[ticket] == expected != by_transformers(stock, prompt)
