"""Continuous batching: requests join and leave between decode steps, each slot at its own position."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from gemma_ft.adapters.trainable_tokens import native_of
from gemma_ft.errors import NonFiniteError, UserError
from gemma_ft.infer.decode_step import DecodeSteps, recorder
from gemma_ft.infer.sampling import Sampler, Sampling, next_tokens
from gemma_ft.model.kv_cache import KVCache
from gemma_ft.system.limits import PREFILL_TOKENS


@dataclass(frozen=True)
class Request:
    """A prompt (token ids that end where the model speaks), and how it is to be continued."""

    prompt_ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Emitted:
    """What a step gave one request: a token, its end, or both. A stop token ends a request and is never given."""

    ticket: int
    token_id: int | None
    finish: Literal["stop", "length"] | None


@dataclass
class _Live:
    """A request with a slot: what it has said so far."""

    ticket: int
    request: Request
    sampler: Sampler
    made: int = 0
    last: int = -1
    finish: Literal["stop", "length"] | None = None


class Engine:
    """Answers many requests at once over one KV cache. Not thread-safe: one thread drives it.

    Rows of the cache, in order: the requests that speak, then those whose prompts are being read: one long prompt,
    piece by piece, or several short ones in a single pass.
    `max_batch`: how many requests hold a slot at once; others wait in line. `max_seq_len`: prompt and answer together
    (None: the model's own limit). The model is in eval mode; any wrapper of PEFT's around the native Gemma will do.
    `known_tokens`: how many ids the tokenizer has, where a model may have more rows (Gemma 3 from 4B on: 63, to fill up
    its embedding); those behind are never said. `agree`: the tokens that this process chose -> those that are said,
    where several compute one model together.
    """

    def __init__(
        self,
        model: Any,
        *,
        stop_ids: Sequence[int],
        max_batch: int = 8,
        max_seq_len: int | None = None,
        known_tokens: int | None = None,
        agree: Callable[[list[int]], list[int]] = list,
    ) -> None:
        native = native_of(model)
        self._native = native
        self.stop_ids, self._agree = frozenset(stop_ids), agree
        self.max_batch, self.known_tokens = max_batch, known_tokens
        self.max_seq_len: int = max_seq_len or native.config.max_position_embeddings
        self.device = native.get_input_embeddings().weight.device
        self._cache = KVCache(native.model.numerics.window_tokens, slots=max_batch, max_seq_len=self.max_seq_len)
        self._decode_step = DecodeSteps(
            native, self._cache, self.device, recorder(native, self.device, alone=agree is list)
        )
        self._waiting: deque[tuple[int, Request]] = deque()
        self._speaking: list[_Live] = []  # slot i of the cache is the i-th
        self._reading: list[_Live] = []  # the slots after them
        self._tickets = 0

    @property
    def active(self) -> int:
        """Requests that hold a slot."""
        return len(self._speaking) + len(self._reading)

    @property
    def unrecorded(self) -> str | None:
        """Why tokens are made operation by operation, where recording them was tried on this GPU and failed."""
        return self._decode_step.reason

    @property
    def waiting(self) -> int:
        """Requests in line for a slot."""
        return len(self._waiting)

    def submit(self, request: Request) -> int:
        """Put a request in line; returns its ticket.

        Raises: UserError when the prompt is empty, or too long for its answer to fit.
        """
        prompt = len(request.prompt_ids)
        if prompt == 0:
            raise UserError("prompt: empty; it needs at least one token")
        if request.max_new_tokens < 1:
            raise UserError(f"max_new_tokens: expected 1 or more, got {request.max_new_tokens}")
        if prompt + request.max_new_tokens > self.max_seq_len:
            raise UserError(
                f"prompt of {prompt} tokens + {request.max_new_tokens} new tokens > {self.max_seq_len}, the longest "
                "sequence of this model; shorten the prompt or ask for fewer tokens"
            )
        self._tickets += 1
        self._waiting.append((self._tickets, request))
        return self._tickets

    def cancel(self, ticket: int) -> None:
        """Drop a request; its slot is free before the next step. One that has ended is nothing to cancel."""
        self._waiting = deque(item for item in self._waiting if item[0] != ticket)
        for live in [live for live in self._reading if live.ticket == ticket]:
            self._cache.lengths[len(self._speaking)] = 0  # none but a lone long prompt holds anything yet
            self._reading.remove(live)
        for slot in [slot for slot, live in enumerate(self._speaking) if live.ticket == ticket]:
            self._free_slot(slot)

    @torch.no_grad()
    def step(self) -> list[Emitted]:
        """One token for every request that speaks, then one pass over prompts in line, whose first tokens come with
        it. Empty while a long prompt is read, and when there is nothing to do.

        Raises: NonFiniteError when the model's logits are not finite. After any error, requests that were active are
        to be cancelled before the next step.
        """
        assert not self._native.training, "the model must be in eval mode"
        emitted = self._decode() if self._speaking else []
        return emitted + self._prefill()

    def _decode(self) -> list[Emitted]:
        emitted = self._sample_next_tokens(self._speaking, self._decode_step([live.last for live in self._speaking]))
        self._dismiss()
        return emitted

    def _prefill(self) -> list[Emitted]:
        """One pass over prompts: at most PREFILL_TOKENS, padding included."""
        self._reading = self._reading or self._joining()
        if not self._reading:
            return []
        slot = len(self._speaking)
        done = self._cache.lengths[slot]
        pieces = [list(live.request.prompt_ids[done : done + PREFILL_TOKENS]) for live in self._reading]
        counts = [len(piece) for piece in pieces]
        padded = [piece + [0] * (max(counts) - len(piece)) for piece in pieces]
        hidden = self._read(torch.tensor(padded, device=self.device), slot, counts)
        if done + counts[0] < len(self._reading[0].request.prompt_ids):
            return []
        emitted = self._sample_next_tokens(self._reading, self._native.head_logits(hidden))
        self._speaking, self._reading = self._speaking + self._reading, []
        self._dismiss()
        return emitted

    def _joining(self) -> list[_Live]:
        """Those in line for whom there is a slot: one with a long prompt, or as many as PREFILL_TOKENS hold."""
        group: list[_Live] = []
        longest = 0
        while self._waiting and len(self._speaking) + len(group) < self.max_batch:
            ticket, request = self._waiting[0]
            longest = max(longest, len(request.prompt_ids))
            if group and longest * (len(group) + 1) > PREFILL_TOKENS:
                break
            self._waiting.popleft()
            sampler = Sampler(request.sampling, request.prompt_ids, request.max_new_tokens, self.device)
            group.append(_Live(ticket, request, sampler))
        return group

    def _read(self, ids: Tensor, first: int, counts: list[int]) -> Tensor:
        """Run slots `first`.. with pieces of prompts ids [B, T]; the hidden states [B, D] of their last tokens."""
        one = self._cache.open(first, counts, self.device)
        states = self._native.model(ids, past_key_values=one, use_cache=True).last_hidden_state
        one.finish()
        last = torch.tensor(counts, device=self.device) - 1
        return states[torch.arange(len(counts), device=self.device), last]

    def _sample_next_tokens(self, speakers: list[_Live], logits: Tensor) -> list[Emitted]:
        """Choose every speaker's next token by logits [B, V]; only here does anything come back from the device."""
        known = logits[:, : self.known_tokens]
        tokens = self._agree(next_tokens(known, [live.sampler for live in speakers]).tolist())
        if -1 in tokens:
            raise NonFiniteError("the model's logits are not finite; its weights are damaged")
        return [self._append_token(live, token) for live, token in zip(speakers, tokens, strict=True)]

    def _append_token(self, live: _Live, token: int) -> Emitted:
        live.made, live.last = live.made + 1, token
        if token in self.stop_ids:
            live.finish = "stop"
            return Emitted(live.ticket, None, live.finish)
        live.sampler.append(token)
        if live.made == live.request.max_new_tokens:
            live.finish = "length"
        return Emitted(live.ticket, token, live.finish)

    def _dismiss(self) -> None:
        """Free the slots of all who have ended."""
        for slot in reversed(range(len(self._speaking))):
            if self._speaking[slot].finish is not None:
                self._free_slot(slot)

    def _free_slot(self, slot: int) -> None:
        """Free the slot of a speaker: the last speaker takes its place, and a long prompt in reading the last one's."""
        end = len(self._speaking) - 1
        self._cache.move(end, slot)
        self._speaking[slot] = self._speaking[end]
        self._speaking.pop()
        if self._reading:
            self._cache.move(end + 1, end)
