"""Scores on held-out rows: the loss per labelled token, and exact match of really generated answers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gemma_ft.build.data import conversations
from gemma_ft.data.conversation import Item, Pair
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.infer.generate import generate_answers


@dataclass(frozen=True)
class Question:
    """A held-out prompt (token ids up to where the model speaks), its readable form, and the one right answer."""

    prompt_ids: list[int]
    prompt: str
    answer: str


@dataclass(frozen=True)
class Reply:
    """What a model answered, without outer white space; `stopped` is False where max_new_tokens cut it off."""

    text: str
    stopped: bool


@dataclass(frozen=True)
class Score:
    """Held-out figures: mean loss per labelled token, share of exactly right answers (None where there was nothing to
    score), and the answers themselves, in the order of the questions.
    """

    loss: float | None
    exact_match: float | None
    answers: list[str]
    more: Mapping[str, float | None] = field(default_factory=dict)  # the objective's own figures

    def figures(self) -> dict[str, float | None]:
        """The numbers, as they stand in summary.json."""
        return {"loss": self.loss, "exact_match": self.exact_match, **self.more}


@torch.no_grad()
def held_out_loss(
    model: Any,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    sum_over_ranks: Callable[[Sequence[float]], list[float]] = list,
    stop: Callable[[], bool] = lambda: False,
) -> float | None:
    """Mean loss per labelled token over all batches, each token weighing the same; None when no token is labelled.

    `sum_over_ranks`: what each of several ranks found in its batches -> what all of them found. `stop`: asked before
    each batch; where it says so, the rest is left out.

    Logits are never built for whole sequences. The model is in eval mode meanwhile and as it was afterwards.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for batch in batches:
        if stop():
            break
        inputs = {key: value.to(device) for key, value in batch.items()}
        with autocast():
            out = model(**inputs, use_cache=False, skip_logits=True)
        tokens = int(out.token_count)
        if tokens:  # a blank row fills up a rank's last batch, and has no mean
            total, count = total + float(out.loss) * tokens, count + tokens
    model.train(was_training)
    total, tokens_in_all = sum_over_ranks([total, float(count)])
    return total / tokens_in_all if tokens_in_all else None


def questions_of(
    items: Sequence[Item | Pair], encoder: ChatEncoder, *, max_seq_len: int, limit: int | None = None
) -> tuple[list[Question], int]:
    """The first `limit` held-out conversations to be answered (None: all), and how many before them were passed over
    because their question does not fit max_seq_len, as in the held-out loss.
    """
    questions: list[Question] = []
    too_long = 0
    for chat in conversations(items):
        if limit is not None and len(questions) == limit:
            break
        ids = encoder.encode_prompt(chat.turns)
        if len(ids) < max_seq_len:
            questions.append(Question(ids, chat.turns[-2].content, chat.turns[-1].content))
        else:
            too_long += 1
    return questions, too_long


def answer_questions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    stop: Callable[[], bool] = lambda: False,
    agree: Callable[[list[int]], list[int]] = list,
    advance: Callable[[int], None] = lambda answers: None,
) -> list[Reply]:
    """The model's greedy answers, generated until a stop token, in the order of the questions; `stop`, `agree` and
    `advance` as in generate_answers.
    """
    answers = generate_answers(
        model,
        [question.prompt_ids for question in questions],
        stop_ids=stop_ids,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        known_tokens=len(tokenizer),
        stop=stop,
        agree=agree,
        advance=advance,
    )
    return [
        Reply(str(tokenizer.decode(answer.ids, skip_special_tokens=False)).strip(), answer.stopped)
        for answer in answers
    ]


def is_exact(reply: Reply, answer: str) -> bool:
    """Whether a reply is the answer letter for letter (outer white space aside). One that never stopped is not."""
    return reply.stopped and reply.text == answer.strip()


def exact_match(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    agree: Callable[[list[int]], list[int]] = list,
    advance: Callable[[int], None] = lambda answers: None,
) -> tuple[float | None, list[str]]:
    """Share of questions whose greedy answer `is_exact`, and the answers. (None, []) without questions."""
    if not questions:
        return None, []
    replies = answer_questions(
        model,
        tokenizer,
        questions,
        stop_ids=stop_ids,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        agree=agree,
        advance=advance,
    )
    right = sum(is_exact(reply, question.answer) for reply, question in zip(replies, questions, strict=True))
    return right / len(questions), [reply.text for reply in replies]
