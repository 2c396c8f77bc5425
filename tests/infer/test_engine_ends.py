"""How a request ends before its answer does: cancelled, refused, or with weights that are damaged."""

from __future__ import annotations

import pytest
import torch

from gemma_ft.errors import UserError
from gemma_ft.infer.engine import Engine, Request
from gemma_ft.infer.sampling import Sampling
from tests.infer.lively import lively
from tests.infer.test_engine import DRAWN, NEW, Heard, alone, model_of, prompts, run, spy
from tests.parity.amplified import SECOND, token_rows


def test_cancelling_frees_the_row_before_the_next_step() -> None:
    model = model_of(SECOND)
    engine, heard = Engine(model, stop_ids=(), max_batch=2), Heard()
    first, second, third, fourth = [engine.submit(Request(prompt, NEW)) for prompt in prompts()[:4]]
    heard.note(engine.step())
    assert (engine.active, engine.waiting) == (2, 2)
    engine.cancel(first)
    engine.cancel(third)
    assert (engine.active, engine.waiting) == (1, 1)
    run(engine, heard)
    engine.cancel(second)  # has ended: nothing happens
    engine.cancel(999)
    assert set(heard.finish) == {second, fourth}
    for ticket, prompt in ((second, prompts()[1]), (fourth, prompts()[3])):
        assert heard.ids[ticket] == alone(model, Request(prompt, NEW))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], 4), "prompt: empty; it needs at least one token"),
        (Request([5], 0), "max_new_tokens: expected 1 or more, got 0"),
        (
            Request([5] * 250, 7),
            "prompt of 250 tokens + 7 new tokens > 256, the longest sequence of this model; "
            "shorten the prompt or ask for fewer tokens",
        ),
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_line(request_: Request, message: str) -> None:
    engine = Engine(model_of(SECOND), stop_ids=())
    with pytest.raises(UserError) as raised:
        engine.submit(request_)
    assert str(raised.value) == message
    assert engine.waiting == 0


def test_damaged_weights_are_told_and_not_sampled_from() -> None:
    for sampling in (Sampling(), DRAWN):
        model = lively(SECOND)
        with torch.no_grad():
            model.model.norm.weight[0] = float("nan")
        engine = Engine(model, stop_ids=())
        engine.submit(Request([5, 6], 3, sampling))
        with pytest.raises(UserError) as raised:
            engine.step()
        assert str(raised.value) == "the model's logits are not finite; its weights are damaged"


def test_a_prompt_in_reading_stays_whole_when_others_leave_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma_ft.infer.engine.PREFILL_TOKENS", 8)
    model = lively(SECOND)
    seen = spy(model, monkeypatch)
    long = Request(token_rows(1, 37)[0].tolist(), 6)
    engine, heard = Engine(model, stop_ids=(), max_batch=3), Heard()
    first, second = (
        engine.submit(Request(prompt, new)) for prompt, new in zip(([5, 6], [9, 8, 7]), (3, 12), strict=True)
    )
    heard.note(engine.step())
    ticket = engine.submit(long)
    heard.note(engine.step())  # its first piece lies in the third row
    heard.note(engine.step())  # the first request has said all it may
    assert (heard.finish, engine.active) == ({first: "length"}, 2)
    heard.note(engine.step())
    engine.cancel(second)
    run(engine, heard)
    assert [tokens for _, tokens in seen["ids"] if tokens > 1] == [3, 8, 8, 8, 8, 5], "nothing is read twice"
    assert heard.ids[ticket] == alone(model_of(SECOND), long)


def test_a_prompt_cancelled_in_reading_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma_ft.infer.engine.PREFILL_TOKENS", 8)
    model = model_of(SECOND)
    next_one = Request(prompts()[0], 6)
    engine = Engine(model, stop_ids=(), max_batch=1)
    long = engine.submit(Request(token_rows(1, 37)[0].tolist(), 6))
    ticket = engine.submit(next_one)
    assert engine.step() == engine.step() == []
    engine.cancel(long)
    assert (engine.active, engine.waiting) == (0, 1)
    heard = run(engine)
    assert heard.ids == {ticket: alone(model, next_one)}
