"""A model with everything that answering needs, opened from where it lies."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from gemma_ft.build.contract import CONTRACT, asking_encoder
from gemma_ft.build.located import adapter_in, located, refuse_reward
from gemma_ft.build.new_tokens import check_rows, embedding_rows
from gemma_ft.build.place import Place, place_of
from gemma_ft.build.pretrained import model_at, tokenizer_of
from gemma_ft.build.text_weights import has_other_names, others_told
from gemma_ft.data.conversation import Turn
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.chat_format import System, gemma_format
from gemma_ft.data.encode.tokenizer_files import has_chat_template
from gemma_ft.infer.detokenize import TextStream
from gemma_ft.infer.engine import Engine, Request
from gemma_ft.infer.sampling import Sampling
from gemma_ft.system import hardware

SYSTEM_TEXTS: dict[System, str] = {
    "fold": "goes before the first question (fold)",
    "turn": "is a turn of its own",
    "drop": "is left out (drop)",
    "error": "is refused (error)",
}


@dataclass
class Session:
    """A model that can be asked, and how to ask it. `notes`: lines for the user that nothing has printed yet."""

    name: str  # as the user wrote it
    place: Place
    model: Any
    tokenizer: Any
    encoder: ChatEncoder
    engine: Engine
    notes: list[str]

    def chat_ids(self, turns: Sequence[Turn]) -> list[int]:
        """A conversation as it was trained, up to where the model speaks. Raises: DataError, as ChatEncoder."""
        return self.encoder.encode_prompt(turns)

    def completion_ids(self, text: str) -> list[int]:
        """Plain text to be continued: BOS, then its ids; no control token can be typed. Raises: DataError."""
        return [self.encoder.control.bos, *self.encoder.content.encode(text)]

    def stream(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Generator[str, None, Literal["stop", "length"]]:
        """The answer to one prompt, in pieces as they come; closing the iterator ends the request. What the generator
        returns says why the answer ended: at a stop token or text, or at max_new_tokens.

        For one caller that has the engine to itself. Raises: UserError, as Engine.submit.
        """
        ticket = self.engine.submit(Request(prompt_ids, max_new_tokens, sampling or Sampling()))
        text = TextStream(self.tokenizer, stop)
        try:
            finish: Literal["stop", "length"] | None = None
            while finish is None and not text.stopped:
                for emitted in self.engine.step():
                    assert emitted.ticket == ticket, "the engine serves another request"
                    finish = emitted.finish
                    if emitted.token_id is not None and (piece := text.push(emitted.token_id)):
                        yield piece
            if rest := text.end():
                yield rest
            return "stop" if text.stopped or finish is None else finish
        finally:
            self.engine.cancel(ticket)


def open_session(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    quantize: str | None = "auto",
    adapter: str | Path | None = None,
    device: torch.device | str | None = None,
    max_batch: int = 1,
) -> Session:
    """A session from a run directory, an adapter, a model folder or a hub id; the options are `load_model`'s (dtype
    None: that of training, else bfloat16), and the Engine's.

    Raises: UserError when there is no such model, or it would not be asked as it was trained.
    """
    place = place_of(path, adapter)
    if place.reward:
        refuse_reward(path if adapter is None else adapter)
    tokenizer = tokenizer_of(place)
    encoder = asking_encoder(tokenizer, path, place.contract, place.of_base.folder)
    check_rows(encoder, embedding_rows(place), path)
    notes = _notes_of_own_adapter(path, place) if adapter is not None else []
    if place.contract is None:
        # A template that refuses system texts says of none how it was trained; Gemma's own are told so in a question.
        encoder = encoder.but(system="fold") if encoder.system_policy == "error" else encoder
        notes += _notes_without_contract(path if adapter is None else adapter, place, encoder)
    beside = others_told(place.of_base.weights) if has_other_names(place.of_base.folder) else None
    notes += [f"{place.base.name}: {beside}"] if beside is not None else []
    dtype = dtype or hardware.dtype_by_name(place.trained_in)
    model = model_at(place, dtype=dtype, quantize=quantize, device=device)
    engine = Engine(model, stop_ids=encoder.stop_ids, max_batch=max_batch, known_tokens=len(tokenizer))
    return Session(str(path), place, model, tokenizer, encoder, engine, notes)


def _notes_of_own_adapter(path: str | Path, place: Place) -> list[str]:
    """What a user should know of a model that has an adapter of its own, where another is put on its base."""
    own = adapter_in(Path(located(path)))
    if own is None or place.adapter is None or own.samefile(place.adapter):
        return []
    return [f"{path}: its own adapter is left off, {place.adapter} is put on its base; to have both, merge the first"]


def _notes_without_contract(path: str | Path, place: Place, encoder: ChatEncoder) -> list[str]:
    """What a user should know of a model that does not say how it was trained."""
    if place.adapter is None and not has_chat_template(place.folder):
        return [f"{path}: a base model without a chat template; it was never tuned to answer"]
    unchecked = "; whether its adapter belongs to this base cannot be checked" if place.adapter is not None else ""
    name, system = encoder.format.name, SYSTEM_TEXTS[encoder.system_policy]
    asked = "" if name == gemma_format(encoder.chat).name else f"asked in {name}, as its own chat template writes; "
    return [f"{path}: no {CONTRACT} with it; {asked}a system text {system}{unchecked}"]
