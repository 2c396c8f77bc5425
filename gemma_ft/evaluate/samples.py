"""Sampled answers of a run on its way: greedy, to the first held-out questions, one JSON line each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemma_ft.evaluate.held_out import Question


def sample_lines(step: int, questions: Sequence[Question], answers: Sequence[str]) -> list[dict[str, Any]]:
    """The lines of samples.jsonl for one step: step, prompt, expected, answer; as many as there are answers."""
    return [
        {"step": step, "prompt": question.prompt, "expected": question.answer, "answer": answer}
        for question, answer in zip(questions, answers, strict=False)
    ]
