"""Who says which of two answers is better: a metric, a reward model, or a function of the user's own, which gives each
answer a number.

A user's file is run by nobody but the training that names it: its hash stands in the run, and a run that goes on with
another file is refused before anything of it is executed (train/loop.py).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_ft.build.place import place_of
from gemma_ft.build.pretrained import load_model
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.errors import UserError
from gemma_ft.evaluate.held_out import Question, Reply
from gemma_ft.evaluate.metrics import METRICS
from gemma_ft.infer.scorer import rewards_of
from gemma_ft.system.files import file_hash

KEY = "objective.judge"
SEPARATOR = ".py:"
Scores = Callable[[Sequence[Question], Sequence[str]], list[float]]  # of answers to questions, one number each


@dataclass(frozen=True)
class Judge:
    """`scores` may raise anything where it is a user's; `sha256`: of the user's file."""

    name: str
    scores: Scores
    sha256: str | None = None


def judge_hash(named: str | None) -> str | None:
    """SHA-256 (hex) of the user's file that a judge names, without running it; None where it names none.

    Raises: UserError where there is no such file.
    """
    return file_hash(_file_of(named)) if named is not None and SEPARATOR in named else None


def judge_of(named: str, encoder: ChatEncoder, *, batch_size: int) -> Judge:
    """The judge that a recipe names: FILE.py:function, which is run now; one of the metrics; or a reward model.

    Raises: UserError where it is none of them.
    """
    if SEPARATOR in named:
        file, function = _file_of(named), named.rpartition(":")[2]
        return Judge(named, _of_function(file, function), file_hash(file))
    if named in METRICS:
        return Judge(named, _of_metric(named))
    place = place_of(named)
    if not place.reward:
        known = ", ".join(METRICS)
        raise UserError(f"{KEY}: {named} is no reward model; name one, FILE.py:function, or one of {known}")
    return Judge(named, _of_reward_model(named, encoder, batch_size))


def _file_of(named: str) -> Path:
    """The user's file. Raises: UserError."""
    path = Path(named.rpartition(":")[0]).expanduser()
    if not path.is_file():
        raise UserError(f"{KEY}: {path}: no such file on this machine; give FILE.py:function")
    return path


def _of_function(file: Path, name: str) -> Scores:
    """A user's function of (prompt, answer, expected), all texts -> a number. Raises: UserError."""
    spec = importlib.util.spec_from_file_location(f"judge_{file.stem}", file)
    assert spec is not None, "a file that ends in .py can be imported"
    assert spec.loader is not None, "and has a loader"
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{KEY}: {file}: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{KEY}: {file} has no function {name}")

    def scores(questions: Sequence[Question], answers: Sequence[str]) -> list[float]:
        found = [
            float(function(one.prompt, answer, one.answer)) for one, answer in zip(questions, answers, strict=True)
        ]
        if not all(map(math.isfinite, found)):
            raise ValueError("gave a number that is not finite")
        return found

    return scores


def _of_metric(name: str) -> Scores:
    def scores(questions: Sequence[Question], answers: Sequence[str]) -> list[float]:
        metric, replies = METRICS[name], [Reply(answer, True) for answer in answers]
        rows = metric.rows(replies, [one.answer for one in questions])
        return [float(metric.figure(row[None])[0]) for row in rows]

    return scores


def _of_reward_model(name: str, encoder: ChatEncoder, batch_size: int) -> Scores:
    """It is in memory while it scores."""

    def scores(questions: Sequence[Question], answers: Sequence[str]) -> list[float]:
        model: Any = load_model(name)
        ended = [
            [*one.prompt_ids, *encoder.content.encode(answer), encoder.control.end_of_turn]
            for one, answer in zip(questions, answers, strict=True)
        ]
        found = rewards_of(model, ended, pad_id=encoder.control.pad, batch_size=batch_size)
        return [float(one) for one in found]

    return scores
