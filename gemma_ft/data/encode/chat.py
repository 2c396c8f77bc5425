"""Conversations -> token ids and labels, built from parts: control ids by id, content by an encoder that knows none.

One policy for system turns, applied alike wherever a prompt is made: fold (before the first question, with a blank line
between), error (refused), drop (left out). A folder tuned elsewhere may give them a turn of their own.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from gemma_ft.data.conversation import Conversation, Item, Pair, PlainText, Turn, order_fault
from gemma_ft.data.encode.chat_format import ChatFormat, System, gemma_format
from gemma_ft.data.encode.template import chat_of, unmarked
from gemma_ft.data.encode.tokenizer import ContentEncoder, ControlIds
from gemma_ft.errors import DataError
from gemma_ft.families.chat_template import SystemPolicy
from gemma_ft.system.limits import IGNORE

SYSTEM_REFUSED = "a system turn, and data.system is 'error'; set it to fold or drop"


@dataclass(frozen=True)
class Encoded:
    """One sequence: ids, and labels of equal length, IGNORE where nothing is trained."""

    input_ids: list[int]
    labels: list[int]
    where: str


class ChatEncoder:
    """Encodes conversations, prompts and documents for one tokenizer in one chat format (default: its Gemma's own
    turns under one system policy); of a conversation all answers are trained, or the last alone, and never one whose
    turn says `train: false`.
    """

    def __init__(
        self,
        tokenizer: Any,
        system_policy: SystemPolicy = "fold",
        trained_turns: Literal["all", "last"] = "all",
        *,
        format: ChatFormat | None = None,
    ) -> None:
        self.chat = chat_of(tokenizer)
        if system_policy not in self.chat.systems:
            raise DataError(f"data.system: unknown policy {system_policy!r}; use {', '.join(self.chat.systems)}")
        self.tokenizer, self.trained_turns = tokenizer, trained_turns
        self.format = format if format is not None else gemma_format(self.chat, system_policy)
        ids = tokenizer.convert_tokens_to_ids(list(self.format.control_tokens))
        start, end, *end_of_role = ids
        self.control = replace(ControlIds.from_tokenizer(tokenizer), start_of_turn=start, end_of_turn=end)
        self.content = ContentEncoder(tokenizer)
        self._more_stop_ids: tuple[int, ...] = ()
        # A head is control tokens (and a name between two), then text, which an unstripped content runs on from.
        self._begins, self._leads = {}, {}
        for role, name in self.format.roles.items():
            name_ids = [*self.content.encode(name), *end_of_role] if end_of_role else []
            self._begins[role] = [start, *name_ids]
            self._leads[role] = self.format.after_role if end_of_role else name + self.format.after_role
        self._heads = {role: [*begin, *self.content.encode(self._leads[role])] for role, begin in self._begins.items()}
        self._after_turn = self.content.encode(self.format.after_turn)

    def but(self, *, system: System | None = None, stop_ids: Sequence[int] = ()) -> "ChatEncoder":
        """This encoder with another way with system texts, or with further ids at which an answer ends."""
        other = object.__new__(ChatEncoder)
        vars(other).update(vars(self), _more_stop_ids=(*self._more_stop_ids, *stop_ids))
        other.format = replace(self.format, system=system or self.format.system)
        return other

    def __getstate__(self) -> dict[str, Any]:
        """For another process that encodes: without the transformers tokenizer, whose libraries take seconds to
        import and of which nothing is needed to encode.
        """
        return {**vars(self), "tokenizer": None}

    @property
    def system_policy(self) -> System:
        """What becomes of a system text."""
        return self.format.system

    @property
    def trained_policy(self) -> SystemPolicy:
        """The system policy of a training, which writes Gemma's turns."""
        assert self.format.system != "turn", "no training writes it"
        return self.format.system

    @property
    def written_ids(self) -> tuple[int, ...]:
        """The control tokens that it writes around texts."""
        names = self.format.control_tokens
        ids = self.tokenizer.convert_tokens_to_ids(list(names))
        return (self.control.bos, self.control.eos, *ids)

    @property
    def stop_ids(self) -> list[int]:
        """Generation ends at any of these: EOS, the end of a turn, and what the model's folder names beside them."""
        return list(dict.fromkeys((self.control.eos, self.control.end_of_turn, *self._more_stop_ids)))

    @property
    def template_hash(self) -> str:
        """SHA-256 (hex) of the template: a server with another feeds a model what it never saw. Marks of what is
        trained are no part of it, for they change no text.
        """
        return hashlib.sha256(unmarked(self.format.template).encode()).hexdigest()

    def content_hash(self, item: Item | Pair) -> bytes:
        """SHA-256 of what an item says to a model, whatever its place: turns as they are encoded, the system turn dealt
        with by the policy, without outer white space. Of answers that are preferred or not it is that of their prompt,
        so that a prompt stays on one side of a split. Raises: DataError as `encode`.
        """
        if isinstance(item, PlainText):
            said: Any = item.text
        else:
            turns = item.prompt if isinstance(item, Pair) else item.turns
            if isinstance(item, Conversation) and item.label is not None:  # the answer that is judged may have turns
                turns = turns[: next(at for at, one in enumerate(turns) if one.role == "assistant" and one.train)]
            said = [[turn.role, turn.content] for turn in self.fold(turns, item.where)]
        return hashlib.sha256(json.dumps(said).encode()).digest()

    def encode(self, conversation: Conversation) -> Encoded:
        """Ids and labels of a whole conversation. Raises: DataError for a system turn under the policy "error"."""
        return self.encode_many([conversation])[0]

    def refuses(self, item: Item | Pair) -> str | None:
        """Why an item cannot be encoded under the system policy, or None."""
        turns = item.prompt if isinstance(item, Pair) else item.turns if isinstance(item, Conversation) else ()
        has_system = bool(turns) and turns[0].role == "system"
        return SYSTEM_REFUSED if has_system and self.system_policy == "error" else None

    def encode_many(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """As `encode`, for many at once: all their texts go to the tokenizer in one call."""
        folded = [self.fold(one.turns, one.where) for one in conversations]
        contents = iter(self._contents([turn for turns in folded for turn in turns]))
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
        contents = self._contents(folded)
        return [*self._assemble(folded, contents, "prompt").input_ids, *self._heads["assistant"]]

    def encode_documents(self, documents: Sequence[PlainText]) -> list[Encoded]:
        """Ids of BOS, the text as it is, EOS, for each; every one but BOS is trained."""
        contents = self.content.encode_many([one.text for one in documents])
        bodies = [[*ids, self.control.eos] for ids in contents]
        return [
            Encoded([self.control.bos, *body], [IGNORE, *body], one.where)
            for one, body in zip(documents, bodies, strict=True)
        ]

    def fold(self, turns: Sequence[Turn], where: str) -> list[Turn]:
        """The turns that are encoded, with stripped text where the format strips it, the system turn dealt with by the
        policy. Raises: DataError.
        """
        fault = order_fault(turns)
        if fault:
            raise DataError(f"{where}: {fault}")
        policy, cut = self.system_policy, self.format.stripped
        body = [Turn(turn.role, turn.content.strip(), turn.train) if turn.role in cut else turn for turn in turns]
        if not body or body[0].role != "system":
            default = self.format.default_system
            return body if default is None else [Turn("system", default), *body]
        if policy == "turn":
            return body
        system, body = body[0].content, body[1:]
        if policy == "error":
            raise DataError(f"{where}: {SYSTEM_REFUSED}")
        if system and body and policy == "fold":
            body[0] = Turn("user", system + self.format.after_system + body[0].content)
        return body

    def _contents(self, turns: Sequence[Turn]) -> list[list[int]]:
        """The ids of each turn's text, all at once; an unstripped one with the text before it, which it may run on from
        (two newlines are one token).
        """
        cut = self.format.stripped
        leads = ["" if turn.role in cut else self._leads[turn.role] for turn in turns]
        return self.content.encode_many([lead + turn.content for lead, turn in zip(leads, turns, strict=True)])

    def _said(self, turn: Turn, content: list[int], last: bool) -> tuple[list[int], list[int]]:
        """What stands before the text of a turn, and the text; a last answer begins where the model is asked for it."""
        head = self._heads[turn.role]
        if turn.role in self.format.stripped:
            return head, content
        whole = [*self._begins[turn.role], *content]
        if last and turn.role == "assistant" and whole[: len(head)] != head:
            return head, self.content.encode(turn.content)
        return whole[: len(head)], whole[len(head) :]

    def _assemble(self, turns: Sequence[Turn], contents: Sequence[list[int]], where: str) -> Encoded:
        ids = [self.control.bos] if self.format.bos else []
        labels = [IGNORE] * len(ids)
        for turn, content in zip(turns, contents, strict=True):
            learned = turn.role == "assistant" and turn.train and (self.trained_turns == "all" or turn is turns[-1])
            head, text = self._said(turn, content, turn is turns[-1])
            said = [*text, self.control.end_of_turn]
            ids += head + said + self._after_turn
            trained = said if learned else [IGNORE] * len(said)
            labels += [IGNORE] * len(head) + trained + [IGNORE] * len(self._after_turn)
        control = (self.control.bos, self.control.start_of_turn, self.control.end_of_turn)
        counts = tuple(ids.count(token) for token in control)
        expected = (int(self.format.bos), len(turns), len(turns))
        assert counts == expected, f"{where}: control tokens do not match the turns: {counts}"
        return Encoded(ids, labels, where)
