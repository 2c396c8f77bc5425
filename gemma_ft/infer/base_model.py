"""The model that another one was tuned from, to be asked the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch

from gemma_ft.adapters.lora import adapter_off
from gemma_ft.build.contract import CONTRACT
from gemma_ft.build.located import Source
from gemma_ft.build.new_tokens import begin_rows
from gemma_ft.build.place import model_place
from gemma_ft.build.pretrained import load_model
from gemma_ft.errors import UserError
from gemma_ft.infer.engine import Engine
from gemma_ft.infer.session import Session


class BaseModelSession:
    """The base of a session's model: the same one with its adapter off, or, for a merged or fully tuned model, the one
    that its contract names, loaded when it is first asked.
    """

    def __init__(self, session: Session, *, quantize: str | None = None) -> None:
        """`quantize`: as `load_model`, for a base that has to be loaded.

        Raises: UserError when the model has no base to be compared with.
        """
        contract = session.place.contract
        if session.place.adapter is None and (contract is None or contract.base is None):
            raise UserError(
                f"{session.name}: no base to compare with; name an adapter, or a model whose {CONTRACT} names its base"
            )
        self._session, self._quantize = session, quantize
        self._loaded: Session | None = None

    @property
    def unloaded(self) -> str | None:
        """What the first answer will have to load, if anything."""
        contract = self._session.place.contract
        in_memory = self._session.place.adapter is not None or self._loaded is not None
        return None if in_memory or contract is None else contract.base

    @contextlib.contextmanager
    def session(self) -> Iterator[Session]:
        """A session in which the base answers, with the tuned model's own prompts and stop tokens.

        Raises: UserError when the base is not there, or is another by now.
        """
        if self._session.place.adapter is not None:
            with adapter_off(self._session.model):
                yield self._session
            return
        if self._loaded is None:
            self._loaded = self._opened()
        yield self._loaded

    def _opened(self) -> Session:
        tuned, contract = self._session, self._session.place.contract
        assert contract is not None, "checked at the start"
        place = model_place(Source(str(contract.base), contract.revision))
        base = place.base
        if place.of_base.unlike(contract) is not None:
            raise UserError(f"{base.name}: is not the base that {tuned.name} was tuned from any more ({CONTRACT})")
        dtype: torch.dtype = tuned.model.get_input_embeddings().weight.dtype
        model = load_model(place.of_base.folder, dtype=dtype, quantize=self._quantize, device=tuned.engine.device)
        begin_rows(model, tuned.tokenizer, base)
        engine = Engine(
            model,
            stop_ids=tuned.encoder.stop_ids,
            max_batch=1,
            max_seq_len=tuned.engine.max_seq_len,
            known_tokens=tuned.engine.known_tokens,
        )
        return replace(tuned, name=base.name, model=model, engine=engine)
