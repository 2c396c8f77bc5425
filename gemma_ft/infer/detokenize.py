"""Token ids -> pieces of text as they come, never half a character, never the beginning of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemma_ft.data.encode.tokenizer_facts import BYTE_PIECE


class TextStream:
    """Text of one answer, piece by piece. The pieces and `end()` joined are what the tokenizer decodes from all ids, up
    to where a stop string begins.

    A run of byte tokens is given when it has ended: only then is it known to be UTF-8. Text that may be the beginning
    of a stop string is given when it has gone on otherwise.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._bytes: list[int] = []  # byte tokens whose run has not ended
        self._held = ""  # decoded text that a stop string may begin in
        self.stopped = False  # a stop string was met: neither it nor what follows is given

    def push(self, token_id: int) -> str:
        """The text that is certain now that this token has come; often its own, sometimes none."""
        if self.stopped:
            return ""
        if BYTE_PIECE.fullmatch(self._tokenizer.convert_ids_to_tokens(token_id) or ""):
            self._bytes.append(token_id)
            return ""
        return self._released(self._decoded([token_id]), last=False)

    def end(self) -> str:
        """What was held back, when no further token comes."""
        return "" if self.stopped else self._released(self._decoded([]), last=True)

    def _decoded(self, ids: list[int]) -> str:
        run, self._bytes = self._bytes, []
        parts = [part for part in (run, ids) if part]
        return "".join(self._tokenizer.decode(part, skip_special_tokens=False) for part in parts)

    def _released(self, text: str, *, last: bool) -> str:
        self._held += text
        ends = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if ends:  # the one that is complete first, so that it does not matter how the text was cut into tokens
            self.stopped = True
            given, self._held = self._held[: min(ends)[1]], ""
            return given
        keep = 0 if last else max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        given, self._held = self._held[:cut], self._held[cut:]
        return given


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
