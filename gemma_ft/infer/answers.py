"""Many requests answered together, their texts given in the order of the requests."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from gemma_ft.infer.detokenize import TextStream
from gemma_ft.infer.engine import Emitted, Request
from gemma_ft.infer.session import Session


@dataclass(frozen=True)
class Text:
    """The text of one answer, how many tokens were made for it, and why it ended: `length` at max_new_tokens."""

    text: str
    tokens: int
    finish: Literal["stop", "length"]


def texts_in_order(
    session: Session, requests: Sequence[Request], *, stop: Sequence[str] = (), ahead: int = 256
) -> Generator[Text]:
    """The answer of each request, in their order, while others are being made; closing the iterator ends them all.

    `ahead`: how many requests may have begun beyond the one that is waited for, so that one long answer does not make
    memory hold all that come after it. Has the session's engine to itself.
    Raises: UserError, as Engine.submit and Engine.step.
    """
    engine = session.engine
    live: dict[int, _Answer] = {}
    done: dict[int, Text] = {}
    begun = given = 0
    try:
        while given < len(requests):
            # as many again as the engine holds stand in line, so that prompts are read together
            while begun < min(len(requests), given + ahead) and len(live) < 2 * engine.max_batch:
                live[engine.submit(requests[begun])] = _Answer(begun, TextStream(session.tokenizer, stop))
                begun += 1
            for emitted in engine.step():
                answer = live.get(emitted.ticket)
                if answer is not None and answer.took(emitted):
                    engine.cancel(emitted.ticket)  # a stop text ends what the engine would go on with
                    del live[emitted.ticket]
                    done[answer.number] = answer.text()
            while given in done:
                yield done.pop(given)
                given += 1
    finally:
        for ticket in live:
            engine.cancel(ticket)


@dataclass
class _Answer:
    """An answer that is being made."""

    number: int
    stream: TextStream
    pieces: list[str] = field(default_factory=list)
    tokens: int = 0
    finish: Literal["stop", "length"] = "stop"

    def took(self, emitted: Emitted) -> bool:
        """Takes what the engine gave; whether the answer is complete with it."""
        if emitted.token_id is not None:
            self.tokens += 1
            self.pieces.append(self.stream.push(emitted.token_id))
        if emitted.finish is not None:
            self.pieces.append(self.stream.end())
        if emitted.finish == "length" and not self.stream.stopped:
            self.finish = "length"
        return emitted.finish is not None or self.stream.stopped

    def text(self) -> Text:
        return Text("".join(self.pieces), self.tokens, self.finish)
