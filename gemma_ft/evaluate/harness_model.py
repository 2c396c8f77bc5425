"""The native model and its engine behind lm-evaluation-harness's own model interface.

Every convention of encoding and cutting is that of the harness's `hf` backend (lm_eval/models/huggingface.py, HFLM), so
that the two agree item by item. Three things are decided here: whatever the model reads begins with exactly one BOS
(HFLM cuts it off with the beginning of what is too long, has none in the later windows of a rolling request, and in
its first a second one where its tokenizer adds one), the end of a turn ends an answer and is no part of its text, and
chats are written under the system policy of the training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from gemma_ft.adapters.trainable_tokens import rows_in
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.pack.collate import Collator
from gemma_ft.errors import UserError
from gemma_ft.evaluate.perplexity import Piece, example_of, final_states, head_loss
from gemma_ft.infer.detokenize import TextStream
from gemma_ft.infer.engine import Engine, Request
from gemma_ft.infer.sampling import Sampling
from gemma_ft.system.limits import IGNORE

MAX_GEN_TOKS = 256  # HFLM's default for tasks that say nothing
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
SEED = 1234  # of sampled answers, counted up by request; the number that the harness seeds torch with
Scored = tuple[float, bool]  # sum of log probabilities, whether greedy decoding would say it


class NativeLM(TemplateLM):
    """A native model, or one that PEFT wrapped, in eval mode, as the harness sees it.

    `truncated` counts requests that were cut at the left, behind their BOS, because they did not fit the model's
    context. `on_progress` hears how many more requests are done. `max_length`: the context, where there is no model
    yet.
    """

    backend = "causal"

    def __init__(
        self,
        model: Any,
        encoder: ChatEncoder,
        *,
        batch_size: int,
        on_progress: Callable[[int], None] | None = None,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        self.model, self.encoder, self.tokenizer = model, encoder, encoder.tokenizer
        self.batch_size = batch_size
        self.truncated = 0
        self._max_length = max_length
        self._on_progress = on_progress or (lambda done: None)
        self._collate = Collator(encoder.control.pad)

    # Text to tokens

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        return self.encoder.control.eos

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is conditioned on."""
        return self.encoder.control.bos

    @property
    def max_length(self) -> int:
        """Tokens that the model can read at once."""
        return self._max_length or int(self.model.config.max_position_embeddings)

    @property
    def tokenizer_name(self) -> str:
        """Tells caches of requests apart: tokenizer and chat template."""
        return f"{self.tokenizer.name_or_path.replace('/', '__')}__{self.encoder.template_hash[:12]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids with one BOS, unless the text spells it already or `add_special_tokens` is False.

        Control tokens in the text are read as such: a chat reaches the harness's models as a string.
        Raises: UserError for one that the model has no row for.
        """
        wanted = not string.startswith(self.encoder.chat.bos) if add_special_tokens is None else add_special_tokens
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=wanted)
        highest = max(ids, default=0)
        if self.model is not None and highest >= rows_in(self.model):
            name = self.tokenizer.convert_ids_to_tokens(highest)
            raise UserError(f"--tasks: a text holds {name}, for which this model has no embedding; take it out")
        return ids

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template under the system policy of the training; None when the harness wants none."""
        return self.encoder.format.template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as it was trained, up to where the model speaks, or to be continued after its last words.

        Raises: UserError for a system text under the policy "error", and for turns in no trained order.
        """
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    chat_history,
                    chat_template=self.encoder.format.template,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )
        except TemplateError as error:
            raise UserError(f"--task-chat: the task's turns do not fit the chat template: {error}") from error

    # Requests

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Scored]:
        """The log probability of each continuation after its context, in the order of the requests."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """The log probability of each whole text after BOS, in windows of the model's context (`_windows`)."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            ids = ids[1:] if ids[:1] == [self.prefix_token_id] else ids  # the prefix is the one BOS
            for context, scored in self._windows(ids):
                windows.append((None, context, scored))
                owners.append(number)
        left = Counter(owners)
        self._on_progress(len(requests) - len(left))  # empty texts

        def on_scored(numbers: list[int]) -> None:
            left.subtract(owners[number] for number in numbers)
            self._on_progress(sum(left[owner] == 0 for owner in {owners[number] for number in numbers}))

        totals = [0.0] * len(requests)
        for owner, (total, _) in zip(owners, self._loglikelihood_tokens(windows, on_scored=on_scored), strict=True):
            totals[owner] += total
        return totals

    def _windows(self, ids: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """(context, scored) ids of a text without its BOS: each token is scored once, and each window begins with BOS
        and is full, with as few tokens of context as that takes, but one at least where any go before.
        """
        size = self.max_length
        if ids:
            yield [self.prefix_token_id], ids[:size]
        for start in range(size, len(ids), size - 1):
            end = min(start + size - 1, len(ids))
            yield [self.prefix_token_id, *ids[end - size : start]], ids[start:end]

    def _cut(self, ids: list[int], room: int) -> list[int]:
        """`ids` where they fit `room`, else BOS and the last ones: Gemma without BOS is another model."""
        if len(ids) <= room:
            return ids
        self.truncated += 1
        return [self.prefix_token_id, *ids[len(ids) - room + 1 :]]

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], *, on_scored: Callable[[list[int]], None] | None = None, **_: Any
    ) -> list[Scored]:
        """(text, context ids, continuation ids) -> scores. Requests that differ in their last token alone, as the
        choices of one question do, are one row of a batch; what is too long is cut (`_cut`).
        """
        on_scored = on_scored or (lambda numbers: self._on_progress(len(numbers)))
        groups: dict[tuple[int, ...], list[Piece]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            piece = self._piece(context, continuation, number)
            groups.setdefault(tuple(piece.input_ids[:-1]), []).append(piece)
        scores: dict[int, Scored] = {}
        by_length = sorted(groups.values(), key=lambda group: -len(group[0].input_ids))
        for start in range(0, len(by_length), self.batch_size):
            chosen = by_length[start : start + self.batch_size]
            batch = self._collate([example_of(group[0]) for group in chosen])
            batch.pop("labels")
            for states, group in zip(final_states(self.model, batch), chosen, strict=True):
                for piece in group:
                    head = head_loss(self.model, states[: len(piece.labels)], torch.tensor(piece.labels))
                    scores[piece.row] = -float(head.loss_sum), int(head.correct_count) == int(head.token_count)
            on_scored([piece.row for group in chosen for piece in group])
        return [scores[number] for number in range(len(requests))]

    def _piece(self, context: list[int], continuation: list[int], number: int) -> Piece:
        """The tokens a model reads, at most max_length and the last one, which it only has to predict."""
        if not 0 < len(continuation) <= self.max_length:
            what = (
                "is empty" if not continuation else f"has {len(continuation)} tokens, the model reads {self.max_length}"
            )
            raise UserError(f"--tasks: a text to be scored {what}; mend the task")
        ids = self._cut([*context, *continuation], self.max_length + 1)
        return Piece(ids, [IGNORE] * (len(ids) - len(continuation)) + list(continuation), number)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """The answer to each context up to its first stop string, in the order of the requests."""
        asked = [self._request(*request.args, seed=SEED + number) for number, request in enumerate(requests)]
        if not asked:
            return []
        longest = max(len(one.prompt_ids) + one.max_new_tokens for one, _ in asked)
        engine = Engine(
            self.model,
            stop_ids=self.encoder.stop_ids,
            max_batch=self.batch_size,
            max_seq_len=longest,
            known_tokens=len(self.tokenizer),
        )
        order = sorted(range(len(asked)), key=lambda number: len(asked[number][0].prompt_ids))
        tickets = {engine.submit(asked[number][0]): number for number in order}
        ids: list[list[int]] = [[] for _ in asked]
        streams = [TextStream(self.tokenizer, stop) for _, stop in asked]
        while engine.active or engine.waiting:
            for emitted in engine.step():
                number = tickets[emitted.ticket]
                if streams[number].stopped:
                    continue
                if emitted.token_id is not None:
                    ids[number].append(emitted.token_id)
                    streams[number].push(emitted.token_id)
                if streams[number].stopped:
                    engine.cancel(emitted.ticket)
                if streams[number].stopped or emitted.finish is not None:
                    self._on_progress(1)
        return [
            postprocess_generated_text(self.tokenizer.decode(said, skip_special_tokens=True), stop, None)
            for said, (_, stop) in zip(ids, asked, strict=True)
        ]

    def _request(self, context: str, options: dict[str, Any], *, seed: int) -> tuple[Request, list[str]]:
        """What the engine is asked, and the strings that end the answer. Raises: UserError as `options_of`."""
        max_new_tokens, sampling, stop = self.options_of(options, seed=seed)
        ids = self._cut(self.tok_encode(context), self.max_length - max_new_tokens)
        return Request(ids, max_new_tokens, sampling), stop

    def options_of(self, options: dict[str, Any], *, seed: int = SEED) -> tuple[int, Sampling, list[str]]:
        """A task's generation_kwargs as how long an answer may get, how it is chosen, and the strings that end it.

        Raises: UserError for options that the engine lacks.
        """
        known = dict(normalize_gen_kwargs(options, MAX_GEN_TOKS))
        stop = handle_stop_sequences(known.pop("until"), eos=self.tokenizer.decode([self.eot_token_id]))
        for text in stop:
            if not isinstance(text, str):
                raise UserError(f"--tasks: generation_kwargs: until: expected texts, got {text!r}; mend it in the task")
        max_new_tokens = known.pop("max_gen_toks")
        sampled = known.pop("do_sample")
        values = {name: known.pop(name) for name in SAMPLING if name in known}
        if known:
            raise UserError(
                f"--tasks: generation_kwargs: {sorted(known)[0]} is not supported; leave it out of the task"
            )
        if not 0 < max_new_tokens < self.max_length - 1:  # BOS alone is no prompt
            raise UserError(
                f"--tasks: max_gen_toks {max_new_tokens} leaves no room for a prompt in {self.max_length} tokens of "
                "context; lower it in the task"
            )
        return max_new_tokens, Sampling(**values, seed=seed) if sampled else Sampling(), stop
