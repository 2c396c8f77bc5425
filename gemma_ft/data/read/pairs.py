"""Pairs of answers: the prompt that both halves have, what may stand in a half, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gemma_ft.data.conversation import Conversation, Pair, Turn
from gemma_ft.data.read.columns import FieldError
from gemma_ft.data.read.row_format import conversation
from gemma_ft.data.read.turns import asked


def pair_of(where: str, prompt: Sequence[Turn], chosen: Sequence[Turn], rejected: Sequence[Turn]) -> Pair:
    """A pair that can be trained, of a prompt that ends with the user, and two halves that begin with an answer.

    Raises: FieldError where one of the two conversations is none, or where the halves are empty or equal.
    """
    for name, half in (("chosen", chosen), ("rejected", rejected)):
        try:
            conversation(where, [*prompt, *half])
        except FieldError as fault:
            raise FieldError(f"{name!r}: {fault}") from None
        if not any(turn.content.strip() for turn in half if turn.role == "assistant"):
            raise FieldError(f"{name!r} is empty; a pair needs two answers")
        if not any(turn.train for turn in half if turn.role == "assistant"):
            raise FieldError(f"{name!r} has no answer that is to be trained ('train' or 'weight' is off in all)")
    if _same(chosen, rejected):
        raise FieldError("'chosen' and 'rejected' are the same answer")
    return Pair(where, tuple(asked(list(prompt))), tuple(chosen), tuple(rejected))


def split_head(chosen: Sequence[Turn], rejected: Sequence[Turn]) -> tuple[list[Turn], list[Turn], list[Turn]]:
    """(prompt, chosen, rejected) of two whole conversations: the longest list of equal messages, and what each has
    after it.

    Raises: FieldError where what comes after it is not two answers to one question.
    """
    systems = [[turn.content.strip() for turn in chat[:1] if turn.role == "system"] for chat in (chosen, rejected)]
    if systems[0] != systems[1]:
        raise FieldError("'chosen' and 'rejected' have different system turns; the prompt of a pair must be one")
    length = next(
        (at for at, two in enumerate(zip(chosen, rejected, strict=False)) if not _same(two[:1], two[1:])),
        min(len(chosen), len(rejected)),
    )
    head, halves = list(chosen[:length]), (list(chosen[length:]), list(rejected[length:]))
    if not any(halves):
        raise FieldError("'chosen' and 'rejected' are the same answer")
    for name, half in zip(("chosen", "rejected"), halves, strict=True):
        if not half:
            raise FieldError(f"{name!r} ends where the other half goes on; a pair needs two answers")
        if half[0].role != "assistant":
            raise FieldError(
                f"'chosen' and 'rejected' differ at turn {length + 1}, which is the {half[0].role}'s in {name!r}; both "
                "must answer the same question"
            )
    return head, *halves


def unpaired(pair: Pair) -> list[Conversation]:
    """The two halves of a pair as answers with a verdict."""
    return [replace(half, label=label) for half, label in zip(pair.halves, (True, False), strict=True)]


def _same(one: Sequence[Turn], other: Sequence[Turn]) -> bool:
    """Whether two lists of messages are equal; white space around a message is in no template."""
    return [(turn.role, turn.content.strip()) for turn in one] == [(turn.role, turn.content.strip()) for turn in other]
