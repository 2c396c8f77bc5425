"""Prompts in, greedy answers out, through the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_ft.infer.engine import Engine, Request


@dataclass(frozen=True)
class Answer:
    """Generated token ids without the stop token; `stopped` is False where max_new_tokens cut the answer off."""

    ids: list[int]
    stopped: bool


def generate_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    known_tokens: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    agree: Callable[[list[int]], list[int]] = list,
    advance: Callable[[int], None] = lambda answers: None,
) -> list[Answer]:
    """Greedy answers to prompts (token ids that end where the model speaks), in the order of the prompts.

    Prompts of similar length are read together. The model is in eval mode meanwhile and as it was afterwards. `stop`:
    asked before each token; where it says so, answers stay as they are, cut. `known_tokens` and `agree` are Engine's;
    `advance` hears how many answers more are whole.
    """
    if not prompts:
        return []
    # A longer sequence than the model was made for is the caller's business here: it is answered, as it is trained on.
    longest = max(map(len, prompts)) + max_new_tokens
    answers = [Answer([], stopped=False) for _ in prompts]
    was_training = model.training
    model.eval()
    try:
        rows = min(batch_size, len(prompts))
        engine = Engine(
            model, stop_ids=stop_ids, max_batch=rows, max_seq_len=longest, known_tokens=known_tokens, agree=agree
        )
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        asked = {engine.submit(Request(prompts[i], max_new_tokens)): i for i in by_length}
        while (engine.waiting or engine.active) and not stop():
            for emitted in engine.step():
                answer = answers[asked[emitted.ticket]]
                if emitted.token_id is not None:
                    answer.ids.append(emitted.token_id)
                if emitted.finish is not None:
                    advance(1)
                if emitted.finish == "stop":
                    answers[asked[emitted.ticket]] = Answer(answer.ids, stopped=True)
    finally:
        model.train(was_training)
    return answers
