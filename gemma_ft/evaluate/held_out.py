"""Scores on held-out rows: the loss per labelled token, and exact match of really generated answers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gemma_ft.infer.generate import generate_answers


@dataclass(frozen=True)
class Question:
    """A held-out prompt (token ids up to where the model speaks), its readable form, and the one right answer."""

    prompt_ids: list[int]
    prompt: str
    answer: str


@dataclass(frozen=True)
class Score:
    """Held-out figures: mean loss per labelled token, share of exactly right answers (None where there was nothing to
    score), and the answers themselves, in the order of the questions.
    """

    loss: float | None
    exact_match: float | None
    answers: list[str]

    def figures(self) -> dict[str, float | None]:
        """The two numbers, as they stand in summary.json."""
        return {"loss": self.loss, "exact_match": self.exact_match}


@torch.no_grad()
def held_out_loss(
    model: Any,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> float | None:
    """Mean loss per labelled token over all batches, each token weighing the same; None when no token is labelled.

    Logits are never built for whole sequences. The model is in eval mode meanwhile and as it was afterwards.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for batch in batches:
        inputs = {key: value.to(device) for key, value in batch.items()}
        with autocast():
            out = model(**inputs, use_cache=False, skip_logits=True)
        tokens = int(out.token_count)
        total, count = total + float(out.loss) * tokens, count + tokens
    model.train(was_training)
    return total / count if count else None


def exact_match(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
) -> tuple[float | None, list[str]]:
    """Share of questions whose greedy answer, generated until a stop token, equals the right one letter for letter
    (outer white space aside), and the answers. An answer that never stopped is wrong. (None, []) without questions.
    """
    if not questions:
        return None, []
    answers = generate_answers(
        model,
        [question.prompt_ids for question in questions],
        stop_ids=stop_ids,
        pad_id=int(tokenizer.pad_token_id),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    texts = [str(tokenizer.decode(answer.ids, skip_special_tokens=False)).strip() for answer in answers]
    right = sum(
        answer.stopped and text == question.answer.strip()
        for answer, text, question in zip(answers, texts, questions, strict=True)
    )
    return right / len(questions), texts
