"""Pairs of answers: the prompt that both halves have, what may stand in a half, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gemma_ft.data.conversation import Conversation, Pair, Turn
from gemma_ft.data.read.columns import FieldError
from gemma_ft.data.read.row_format import conversation
from gemma_ft.data.read.turns import asked

HALVES = ("'chosen'", "'rejected'")  # what they are called where rows say nothing else


def pair_of(
    where: str,
    prompt: Sequence[Turn],
    chosen: Sequence[Turn],
    rejected: Sequence[Turn],
    *,
    margin: float | None = None,
    names: tuple[str, str] = HALVES,
) -> Pair:
    """A pair that can be trained, of a prompt that ends with the user, and two halves that begin with an answer.

    Raises: FieldError where one of the two conversations is none, or where a turn is empty or the halves are equal.
    """
    if not prompt or prompt[-1].role != "user":
        raise FieldError(f"the prompt of a pair must end with a user turn, got {prompt[-1].role if prompt else 'none'}")
    if any(not turn.content.strip() for turn in prompt if turn.role == "user"):
        raise FieldError("the prompt has an empty question")
    if any(not turn.content.strip() for turn in prompt if turn.role == "assistant"):
        raise FieldError("the prompt has an empty answer")
    for name, half in zip(names, (chosen, rejected), strict=True):
        if not half or half[0].role != "assistant":
            raise FieldError(f"{name} must begin with an answer, got {half[0].role if half else 'none'}")
        try:
            conversation(where, [*asked(list(prompt)), *half])
        except FieldError as fault:
            raise FieldError(f"{name}: {fault}") from None
        if any(not turn.content.strip() for turn in half):
            raise FieldError(f"{name} is empty" if len(half) == 1 else f"{name} has an empty turn")
    if same(chosen, rejected):
        raise FieldError(f"{names[0]} and {names[1]} are the same answer")
    return Pair(where, tuple(asked(list(prompt))), tuple(chosen), tuple(rejected), margin)


def split_head(
    chosen: Sequence[Turn], rejected: Sequence[Turn], names: tuple[str, str] = HALVES
) -> tuple[list[Turn], list[Turn], list[Turn]]:
    """(prompt, chosen, rejected) of two whole conversations: the longest list of equal messages, and what each has
    after it.

    Raises: FieldError where what comes after it is not two answers to one question.
    """
    both = f"{names[0]} and {names[1]}"
    systems = [[turn.content.strip() for turn in chat[:1] if turn.role == "system"] for chat in (chosen, rejected)]
    if systems[0] != systems[1]:
        raise FieldError(f"{both} have different system turns; the prompt of a pair must be one")
    shorter = min(len(chosen), len(rejected))
    length = next((at for at in range(shorter) if not same(chosen[at : at + 1], rejected[at : at + 1])), shorter)
    head, halves = list(chosen[:length]), (list(chosen[length:]), list(rejected[length:]))
    if not any(halves):
        raise FieldError(f"{both} are the same answer")
    for name, half in zip(names, halves, strict=True):
        if not half:
            raise FieldError(f"{name} ends after turn {length}, where the other goes on; a pair needs two answers")
    asks = next((name for name, half in zip(names, halves, strict=True) if half[0].role != "assistant"), None)
    if asks is not None:
        raise FieldError(
            f"{both} differ at turn {length + 1}, which is no answer in {asks}; both must answer the same question"
        )
    return head, *halves


def unpaired(pairs: Sequence[Pair]) -> list[Conversation]:
    """The halves of pairs as answers with a verdict; a half that several pairs have in common once."""
    found: list[Conversation] = []
    for number, pair in enumerate(pairs):
        chosen, rejected = (replace(half, label=label) for half, label in zip(pair.halves, (True, False), strict=True))
        if number == 0 or (pair.prompt, pair.chosen) != (pairs[number - 1].prompt, pairs[number - 1].chosen):
            found.append(chosen)
        found.append(rejected)
    return found


def same(one: Sequence[Turn], other: Sequence[Turn]) -> bool:
    """Whether two lists of messages are equal; white space around a message is in no template."""
    return [(turn.role, turn.content.strip()) for turn in one] == [(turn.role, turn.content.strip()) for turn in other]
