"""Answers to the requests of held-out pairs, and how many of them have the form that is preferred.

An answer is one line of JSON. It has the preferred form where its keys come in the order of the chosen answer's, and
is right where it holds the same values as the chosen one, in any order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gemma_ft.data.conversation import Turn
from gemma_ft.infer.generate import generate_answers
from gemma_ft.infer.session import open_session

MAX_NEW_TOKENS, BATCH = 64, 25


@dataclass(frozen=True)
class Forms:
    """Shares of the answers, and their mean length."""

    answers: int
    preferred: float  # of all answers, in the order of the chosen one's keys
    right: float  # of all answers, with the values of the chosen one
    ended: float  # by themselves
    mean_tokens: float
    mean_characters: float

    def in_words(self) -> str:
        """One line for a terminal."""
        return (
            f"preferred form {self.preferred:.0%}, right by content {self.right:.0%}, "
            f"{self.mean_tokens:.1f} tokens an answer"
        )


def pairs_in(path: Path, limit: int | None = None) -> list[dict[str, str]]:
    """The first rows of a file of pairs."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:limit]]


def fields_of(text: str) -> dict[str, Any] | None:
    """The object that an answer is; None where it is none."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def measured(pairs: Sequence[dict[str, str]], texts: Sequence[str], ids: Sequence[Sequence[int]],
             ended: Sequence[bool]) -> Forms:  # fmt: skip
    """Shares and lengths of the answers to the requests of `pairs`."""
    wanted = [json.loads(pair["chosen"]) for pair in pairs]
    found = [fields_of(text) for text in texts]
    both = list(zip(wanted, found, strict=True))
    count = len(both)
    return Forms(
        answers=count,
        preferred=sum(one is not None and list(one) == list(wish) for wish, one in both) / count,
        right=sum(one == wish for wish, one in both) / count,
        ended=sum(ended) / count,
        mean_tokens=sum(map(len, ids)) / count,
        mean_characters=sum(map(len, texts)) / count,
    )


def answered(model: str | Path, pairs: Sequence[dict[str, str]], *, dtype: torch.dtype | None = None
             ) -> tuple[Forms, list[str]]:  # fmt: skip
    """Greedy answers of a run, an adapter or a model folder to the requests of `pairs`, and what they are like."""
    session = open_session(model, dtype=dtype)
    prompts = [session.chat_ids([Turn("user", pair["prompt"])]) for pair in pairs]
    found = generate_answers(session.model, prompts, stop_ids=session.encoder.stop_ids, max_new_tokens=MAX_NEW_TOKENS,
                             batch_size=BATCH, known_tokens=len(session.tokenizer))  # fmt: skip
    ids = [answer.ids for answer in found]
    texts = [session.tokenizer.decode(one, skip_special_tokens=False) for one in ids]
    return measured(pairs, texts, ids, [answer.stopped for answer in found]), texts


def as_figures(forms: Forms) -> dict[str, float]:
    """For a result file."""
    return {name: round(value, 4) for name, value in asdict(forms).items()}
