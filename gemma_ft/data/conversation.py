"""What rows become: conversations of turns, pairs of them, or plain documents. No tokenizer is known here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gemma_ft.system.row_kind import RowKind as RowKind

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turn:
    """One message: who says it, and the text; `train`: whether it is to be learned, where it is an answer."""

    role: Role
    content: str
    train: bool = True


@dataclass(frozen=True)
class Conversation:
    """An optional system turn, then user and assistant in turn, ending with an assistant.

    `left_out` counts turns of the row that are not here (a leading answer, a trailing question; see
    formats/sharegpt.py). `weight`: of each of its trained tokens in the loss. `unread`: the row's fields that are in
    none of this. `label`: of an unpaired preference, whether its answer is a good one.
    """

    where: str
    turns: tuple[Turn, ...]
    left_out: int = 0
    weight: float = 1.0
    unread: tuple[str, ...] = ()
    label: bool | None = None


@dataclass(frozen=True)
class Pair:
    """One prompt and two ways on from it, of which `chosen` is the better.

    `prompt`: [system,] user, assistant, ..., user; no answer in it is trained. `chosen`, `rejected`: assistant, then
    user and assistant in turn. `margin`: by how much it is better, where the row says so. `weight`: of the pair in the
    loss. `unread`: as of a Conversation.
    """

    where: str
    prompt: tuple[Turn, ...]
    chosen: tuple[Turn, ...]
    rejected: tuple[Turn, ...]
    margin: float | None = None
    weight: float = 1.0
    unread: tuple[str, ...] = ()

    @property
    def halves(self) -> tuple[Conversation, Conversation]:
        """The chosen and the rejected conversation, whole; `unread` is told with the first alone."""
        first = Conversation(self.where, self.prompt + self.chosen, weight=self.weight, unread=self.unread)
        return first, Conversation(self.where, self.prompt + self.rejected, weight=self.weight)


@dataclass(frozen=True)
class PlainText:
    """A plain text to be continued; nothing in it is a turn. `weight`: of each of its tokens in the loss; `unread`: the
    row's fields that are not in it.
    """

    where: str
    text: str
    weight: float = 1.0
    unread: tuple[str, ...] = ()


Item = Conversation | PlainText


def texts_of(item: Item) -> list[str]:
    """All that an item says: its turns in their order, or its one text."""
    return [turn.content for turn in item.turns] if isinstance(item, Conversation) else [item.text]


def order_fault(turns: Sequence[Turn]) -> str | None:
    """Why these turns are no conversation (None when they are): [system,] user, assistant, user, ..."""
    wrong = misplaced(turns)
    return f"turn {wrong[0] + 1}: {wrong[1]}" if wrong else None


def misplaced(turns: Sequence[Turn]) -> tuple[int, str] | None:
    """The place, counted from 0, of the first turn that is none of a conversation where it stands, and why."""
    for place, turn in enumerate(turns):
        if turn.role not in ROLES:
            return place, f"unknown role {turn.role!r}; known roles: {', '.join(ROLES)}"
    first = 1 if turns and turns[0].role == "system" else 0
    for place, turn in enumerate(turns[first:], start=first):
        expected = "user" if (place - first) % 2 == 0 else "assistant"
        if turn.role == expected:
            continue
        if turn.role == "system":
            return place, "a system turn can only come first"
        if place == first:
            return place, f"a conversation starts with a user turn, got {turn.role}"
        return place, f"user and assistant must alternate, got {turn.role} after {turn.role}"
    return None


def text_fault(value: object) -> str | None:
    """Why this value cannot be a turn's or a document's text (None when it can). Empty text is text."""
    if value is None:
        return "is null, expected text"
    if not isinstance(value, str):
        return f"is {kind_of(value)}, expected text"
    if "\x00" in value:
        return "holds a NUL character; is the file damaged, or not UTF-8?"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"holds half a surrogate pair at character {error.start + 1}; the text was cut inside a character"
    return None


def kind_of(value: object) -> str:
    """A value's kind in JSON's words, with its article: "a list", "a number", "null"."""
    if value is None:
        return "null"
    kinds = ((bool, "true or false"), (str, "text"), (int | float, "a number"), (list, "a list"), (dict, "an object"))
    return next((name for kind, name in kinds if isinstance(value, kind)), f"a {type(value).__name__}")
