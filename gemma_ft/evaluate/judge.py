"""Who says which of two answers is better: a metric, a reward model, or a function of the user's own, which gives each
answer a number.

A user's file is run by nobody but the training that names it: its hash stands in the run, and a run that goes on with
another file is refused before anything of it is executed (train/loop.py).
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from gemma_ft.build.place import place_of
from gemma_ft.build.pretrained import tokenizer_of
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.errors import UserError, first_line
from gemma_ft.evaluate.held_out import Question, Reply
from gemma_ft.evaluate.metrics import METRICS
from gemma_ft.infer.scorer import open_scorer
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


def judge_of(named: str, encoder: ChatEncoder, *, batch_size: int, sha256: str | None = None) -> Judge:
    """The judge that a recipe names: FILE.py:function, which is run now; one of the metrics; or a reward model.
    encoder: that of the model which is trained. sha256: of the user's file as the run knows it.

    Raises: UserError where it is none of them, where the file is another than that, and where it cannot be run.
    """
    if SEPARATOR in named:
        file, function = _file_of(named), named.rpartition(":")[2]
        code = file.read_bytes()
        found = hashlib.sha256(code).hexdigest()
        if sha256 not in (None, found):
            raise UserError(f"{KEY}: {file} was changed since this run began to read it; start the run again")
        return Judge(named, _of_function(file, code, function), found)
    if named.endswith(".py"):
        raise UserError(f"{KEY}: {named}: names no function of it; give FILE.py:function")
    if named in METRICS:
        return Judge(named, _of_metric(named))
    place = place_of(named)
    if not place.reward:
        known = ", ".join(METRICS)
        raise UserError(f"{KEY}: {named} is no reward model; name one, FILE.py:function, or one of {known}")
    if ChatEncoder(tokenizer_of(place)).content.sha256 != encoder.content.sha256:
        raise UserError(
            f"{KEY}: {named} has another tokenizer than the model that is trained; name a reward model of the same "
            "generation of Gemma"
        )
    return Judge(named, _of_reward_model(named, encoder, batch_size))


def _file_of(named: str) -> Path:
    """The user's file. Raises: UserError."""
    path = Path(named.rpartition(":")[0]).expanduser()
    if not path.is_file():
        raise UserError(f"{KEY}: {path}: no such file on this machine; give FILE.py:function")
    return path


def _of_function(file: Path, code: bytes, name: str) -> Scores:
    """A user's function of (prompt, answer, expected), all texts -> a number, out of the bytes of its file, which are
    run here; nothing that lies compiled beside it is. Raises: UserError.
    """
    module = ModuleType(f"judge_{file.stem}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # dataclasses and others look for it there
    try:
        exec(compile(code, str(file), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        raise UserError(f"{KEY}: {file}: {first_line(error, kind=True)}") from error
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
        wanted = [one.answer for one in questions]
        if not metric.fits(wanted):
            raise ValueError(f"it needs {metric.needs} in every held-out answer")
        rows = metric.rows(replies, wanted)
        return [float(metric.figure(row[None])[0]) for row in rows]

    return scores


def _of_reward_model(name: str, encoder: ChatEncoder, batch_size: int) -> Scores:
    """It is in memory while it scores."""

    def scores(questions: Sequence[Question], answers: Sequence[str]) -> list[float]:
        scorer = open_scorer(name)
        ended = [
            [*one.prompt_ids, *encoder.content.encode(answer), encoder.control.end_of_turn]
            for one, answer in zip(questions, answers, strict=True)
        ]
        return scorer.rewards(ended, batch_size=batch_size)

    return scores
