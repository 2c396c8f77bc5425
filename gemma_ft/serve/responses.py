"""What is sent back: OpenAI's objects for whole answers, and its events for streamed ones."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from gemma_ft.serve.errors import ApiFault
from gemma_ft.serve.scheduler import Call, Piece

DONE = b"data: [DONE]\n\n"
OBJECTS = {"chat": ("chat.completion", "chat.completion.chunk"), "text": ("text_completion", "text_completion")}
PREFIXES = {"chat": "chatcmpl", "text": "cmpl"}


@dataclass(frozen=True)
class Answer:
    """How the answer to one request looks: a chat's or a completion's, under one id."""

    kind: Literal["chat", "text"]
    model: str
    prompt_tokens: int
    include_usage: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self, call: Call) -> dict[str, Any]:
        """The object with every choice, once all have ended. Raises: ApiFault."""
        texts, finishes, tokens = [""] * len(call.jobs), [""] * len(call.jobs), 0
        async for piece in call.results():
            texts[piece.choice] += piece.text
            finishes[piece.choice] = piece.finish or ""
            tokens += piece.tokens
        choices = [self._choice(index, text, finishes[index]) for index, text in enumerate(texts)]
        return {**self._head(OBJECTS[self.kind][0]), "choices": choices, "usage": self._usage(tokens)}

    async def events(self, call: Call) -> AsyncIterator[bytes]:
        """Server-sent events: chunks as the pieces come, usage where it was asked for, [DONE]; or one error."""
        tokens = 0
        try:
            if self.kind == "chat":
                for job in call.jobs:
                    yield self._event([_delta(job.choice, {"role": "assistant", "content": ""}, None)])
            async for piece in call.results():
                tokens += piece.tokens
                for choice in self._chunks(piece):
                    yield self._event([choice])
            if self.include_usage:
                yield self._event([], self._usage(tokens))
            yield DONE
        except ApiFault as fault:
            yield b"data: " + fault.content + b"\n\n"

    def _chunks(self, piece: Piece) -> list[dict[str, Any]]:
        if self.kind == "text":
            given = bool(piece.text or piece.finish)
            return [self._choice(piece.choice, piece.text, piece.finish)] if given else []
        chunks = [_delta(piece.choice, {"content": piece.text}, None)] if piece.text else []
        return [*chunks, _delta(piece.choice, {}, piece.finish)] if piece.finish else chunks

    def _choice(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        said = {"text": text}
        if self.kind == "chat":
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}  # type: ignore[dict-item]
        return {"index": index, **said, "logprobs": None, "finish_reason": finish}

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        chunk = {**self._head(OBJECTS[self.kind][1]), "choices": choices}
        if self.include_usage:
            chunk["usage"] = usage
        return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"

    def _head(self, name: str) -> dict[str, Any]:
        return {"id": f"{PREFIXES[self.kind]}-{self.id}", "object": name, "created": self.created, "model": self.model}

    def _usage(self, tokens: int) -> dict[str, int]:
        total = self.prompt_tokens + tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": tokens, "total_tokens": total}


class EventStream(StreamingResponse):
    """A streamed answer that gives its places back however it ends: done, failed, or the client left in the middle."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], at_end: Callable[[], None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.at_end()


def _delta(index: int, delta: dict[str, str], finish: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
