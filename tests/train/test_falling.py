"""A run that makes the chosen answers less likely is told, once, and only then."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from gemma_ft.train.falling import STEPS, chosen_falls

LINE = (
    "step {step}: over 50 steps the chosen answers got less likely (logps/chosen {before} -> {after}) while margins "
    "grew: probability moves to answers in neither half; {add}lower train.learning_rate, or stop earlier"
)
Course = Callable[[int], float | None]


def told(chosen: Course, margin: Course, *, steps: int = 120, sft_weight: float | None = 0.0) -> list[str]:
    """What is said over a run of made-up figures, its memory written and read again after each step."""
    past: dict[str, Any] = {}
    lines = []
    for step in range(1, steps + 1):
        figures = {"step": step, "logps/chosen": chosen(step), "rewards/margins": margin(step)}
        lines.append(chosen_falls(figures, past, sft_weight))
        past = json.loads(json.dumps(past))
        assert len(past.get("recent", [])) <= STEPS
    return [line for line in lines if line is not None]


def test_chosen_answers_that_fall_while_margins_grow_are_told_once() -> None:
    add = "set objective.sft_weight above 0, "
    line = LINE.format(step=50, before="-113.0", after="-138.0", add=add)
    assert told(lambda step: -100.0 - step, lambda step: step / 10) == [line]
    assert told(lambda step: -100.0 - step, lambda step: step / 10, sft_weight=None) == [line.replace(add, "")]
    assert told(lambda step: -100.0 - step, lambda step: step / 10, steps=49) == []


def test_steps_whose_rows_differ_do_not_hide_it_and_do_not_look_like_it() -> None:
    draw = random.Random(0)
    noise = [draw.gauss(0, 10) for _ in range(1000)]
    other = [draw.gauss(0, 1) for _ in range(1000)]
    assert len(told(lambda step: -200.0 - step + noise[step], lambda step: step / 10 + other[step])) == 1
    assert told(lambda step: -200.0 + noise[step], lambda step: step / 10 + other[step]) == []


def test_what_is_no_fault_is_not_told() -> None:
    assert told(lambda step: -100.0 + step, lambda step: step / 10) == []  # they rise
    assert told(lambda step: -100.0 - step, lambda step: 0.0) == []  # the margin stands
    assert told(lambda step: -100.0 - step, lambda step: -step / 10) == []
    assert told(lambda step: -100.0, lambda step: 0.0) == []  # nothing moves
    assert told(lambda step: None, lambda step: step / 10) == []  # a reward model has no log-probabilities


def test_a_step_without_one_of_the_labels_is_passed_over() -> None:
    lines = told(lambda step: None if step % 2 else -100.0 - step, lambda step: None if step % 3 == 0 else step / 10)
    assert lines == []  # a third of 120 steps has both
    assert len(told(lambda step: None if step % 2 else -100.0 - step, lambda step: step / 10)) == 1


def test_fault_steps_that_are_not_finite_are_passed_over() -> None:
    assert len(told(lambda step: float("nan") if step == 7 else -100.0 - step, lambda step: step / 10)) == 1
