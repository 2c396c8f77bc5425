"""Conversations -> token ids and labels, built from parts: control ids by id, content by an encoder that knows none.

One policy for system turns, applied alike wherever a prompt is made:
fold (before the first question, with a blank line between), error (refused), drop (left out).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gemma_ft.data.items import Conversation, Document, Item, Turn, order_fault
from gemma_ft.data.template import (
    AFTER_ROLE,
    AFTER_SYSTEM,
    AFTER_TURN,
    ROLE_NAMES,
    SYSTEM_POLICIES,
    SystemPolicy,
    chat_template,
)  # fmt: skip
from gemma_ft.data.tokenizer import ContentEncoder, ControlIds
from gemma_ft.errors import DataError

__all__ = ["IGNORE", "ChatEncoder", "Encoded", "chat_template"]

IGNORE = -100
SYSTEM_REFUSED = "a system turn, and data.system is 'error'; set it to fold or drop"


@dataclass(frozen=True)
class Encoded:
    """One sequence: ids, and labels of equal length, IGNORE where nothing is trained."""

    input_ids: list[int]
    labels: list[int]
    where: str


class ChatEncoder:
    """Encodes conversations, prompts and documents for one tokenizer under one system policy; of a conversation all
    answers are trained, or the last alone, and never one whose turn says `train: false`.
    """

    def __init__(
        self, tokenizer: Any, system_policy: SystemPolicy = "fold", trained_turns: Literal["all", "last"] = "all"
    ) -> None:
        if system_policy not in SYSTEM_POLICIES:
            raise DataError(f"data.system: unknown policy {system_policy!r}; use {', '.join(SYSTEM_POLICIES)}")
        self.tokenizer = tokenizer
        self.system_policy, self.trained_turns = system_policy, trained_turns
        self.control = ControlIds.from_tokenizer(tokenizer)
        self.content = ContentEncoder(tokenizer)
        heads = {role: self.content.encode(name + AFTER_ROLE) for role, name in ROLE_NAMES.items()}
        self._heads = {role: [self.control.start_of_turn, *ids] for role, ids in heads.items()}
        self._after_turn = self.content.encode(AFTER_TURN)

    def __getstate__(self) -> dict[str, Any]:
        """For another process that encodes: without the transformers tokenizer, whose libraries take seconds to
        import and of which nothing is needed to encode.
        """
        return {**vars(self), "tokenizer": None}

    @property
    def stop_ids(self) -> list[int]:
        """Generation ends at any of these."""
        return [self.control.eos, self.control.end_of_turn]

    @property
    def template_hash(self) -> str:
        """SHA-256 (hex) of the template under this policy: a server with another feeds a model what it never saw."""
        return hashlib.sha256(chat_template(self.system_policy).encode()).hexdigest()

    def content_hash(self, item: Item) -> bytes:
        """SHA-256 of what an item says to a model, whatever its place: turns as they are encoded, the system turn dealt
        with by the policy, without outer white space. Raises: DataError as `encode`.
        """
        said: Any = (
            item.text
            if isinstance(item, Document)
            else [[turn.role, turn.content] for turn in self.fold(item.turns, item.where)]
        )
        return hashlib.sha256(json.dumps(said).encode()).digest()

    def encode(self, conversation: Conversation) -> Encoded:
        """Ids and labels of a whole conversation. Raises: DataError for a system turn under the policy "error"."""
        return self.encode_many([conversation])[0]

    def refuses(self, item: Item) -> str | None:
        """Why an item cannot be encoded under the system policy, or None."""
        has_system = isinstance(item, Conversation) and item.turns[0].role == "system"
        return SYSTEM_REFUSED if has_system and self.system_policy == "error" else None

    def encode_many(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """As `encode`, for many at once: all their texts go to the tokenizer in one call."""
        folded = [self.fold(one.turns, one.where) for one in conversations]
        contents = iter(self.content.encode_many([turn.content for turns in folded for turn in turns]))
        return [
            self._assemble(turns, [next(contents) for _ in turns], one.where)
            for one, turns in zip(conversations, folded, strict=True)
        ]

    def encode_prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Ids up to where the last answer begins: what a model is asked to continue.

        A last turn of the assistant is left off, so the prompt of a conversation's turns is a prefix of `encode`.

        Raises: DataError when the turns are in no order that was trained, or hold no question.
        """
        asked = turns[:-1] if turns and turns[-1].role == "assistant" else turns
        if not asked or asked[-1].role != "user":
            raise DataError("a prompt needs a user turn at its end")
        folded = self.fold(asked, "prompt")
        contents = self.content.encode_many([turn.content for turn in folded])
        return [*self._assemble(folded, contents, "prompt").input_ids, *self._heads["assistant"]]

    def encode_document(self, document: Document) -> Encoded:
        """Ids of BOS, the text as it is, EOS; every one but BOS is trained."""
        return self.encode_documents([document])[0]

    def encode_documents(self, documents: Sequence[Document]) -> list[Encoded]:
        """As `encode_document`, for many at once."""
        contents = self.content.encode_many([one.text for one in documents])
        bodies = [[*ids, self.control.eos] for ids in contents]
        return [
            Encoded([self.control.bos, *body], [IGNORE, *body], one.where)
            for one, body in zip(documents, bodies, strict=True)
        ]

    def fold(self, turns: Sequence[Turn], where: str) -> list[Turn]:
        """User and assistant turns with stripped text, the system turn dealt with by the policy. Raises: DataError."""
        fault = order_fault(turns)
        if fault:
            raise DataError(f"{where}: {fault}")
        stripped = [Turn(turn.role, turn.content.strip(), turn.train) for turn in turns]
        if not stripped or stripped[0].role != "system":
            return stripped
        system, body = stripped[0].content, stripped[1:]
        if self.system_policy == "error":
            raise DataError(f"{where}: {SYSTEM_REFUSED}")
        if system and body and self.system_policy == "fold":
            body[0] = Turn("user", system + AFTER_SYSTEM + body[0].content)
        return body

    def _assemble(self, turns: Sequence[Turn], contents: Sequence[list[int]], where: str) -> Encoded:
        ids = [self.control.bos]
        labels = [IGNORE]
        for turn, content in zip(turns, contents, strict=True):
            head, said = self._heads[turn.role], [*content, self.control.end_of_turn]
            ids += head + said + self._after_turn
            learned = turn.role == "assistant" and turn.train and (self.trained_turns == "all" or turn is turns[-1])
            trained = said if learned else [IGNORE] * len(said)
            labels += [IGNORE] * len(head) + trained + [IGNORE] * len(self._after_turn)
        control = (self.control.bos, self.control.start_of_turn, self.control.end_of_turn)
        counts = tuple(ids.count(token) for token in control)
        assert counts == (1, len(turns), len(turns)), f"{where}: control tokens do not match the turns: {counts}"
        return Encoded(ids, labels, where)
