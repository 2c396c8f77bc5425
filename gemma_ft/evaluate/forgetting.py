"""The canary: a few general rows scored with and without what was trained, to see what tuning made a model forget."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gemma_ft.adapters.lora import adapter_off
from gemma_ft.build.contract import sha256_of
from gemma_ft.build.located import located_rows
from gemma_ft.data.conversation import Conversation, PlainText
from gemma_ft.data.encode.chat import ChatEncoder, Encoded
from gemma_ft.data.pack.arrange import Example
from gemma_ft.data.pack.collate import Collator
from gemma_ft.data.read.parse_rows import parse_rows
from gemma_ft.data.read.sources import read_rows
from gemma_ft.errors import DataError
from gemma_ft.evaluate.held_out import held_out_loss
from gemma_ft.system.limits import IGNORE

ROWS, TOKENS = 32, 128  # so few and so short that they may be scored at every interval
TOLERATED = 0.1  # nats per token that the canary loss may rise without a word
SHARE_OF_GAIN = 0.5  # and what it may rise, measured by what the held-out loss fell


@dataclass(frozen=True)
class ForgettingSet:
    """Canary rows as batches of tensors on the CPU, and a hash of their tokens: losses of the same hash compare."""

    rows: int
    sha256: str
    batches: list[dict[str, torch.Tensor]]


def build_forgetting_set(source: str, encoder: ChatEncoder, *, batch_size: int) -> ForgettingSet:
    """The first ROWS rows of a file or hub data set, each cut at TOKENS tokens, `batch_size` at a time.

    Raises: DataError naming file and line, or saying that no answer begins within the limit.
    """
    items = parse_rows(read_rows(located_rows(source)))[:ROWS]
    encoded = encoder.encode_many([item for item in items if isinstance(item, Conversation)])
    encoded += encoder.encode_documents([item for item in items if isinstance(item, PlainText)])
    examples = [_cut(one) for one in encoded if any(label != IGNORE for label in one.labels[:TOKENS])]
    if not examples:
        raise DataError(
            f"eval.canary: {source}: no answer begins within the first {TOKENS} tokens of its first {ROWS} rows; "
            "give shorter rows, or eval.canary=null"
        )
    examples.sort(key=lambda example: len(example["input_ids"]))
    collate = Collator(encoder.control.pad)
    batches = [collate(examples[start : start + batch_size]) for start in range(0, len(examples), batch_size)]
    told = json.dumps([[example["input_ids"], example["labels"]] for example in examples])
    return ForgettingSet(len(examples), sha256_of(told), batches)


def _cut(one: Encoded) -> Example:
    ids = one.input_ids[:TOKENS]
    return {
        "input_ids": ids,
        "labels": one.labels[:TOKENS],
        "position_ids": list(range(len(ids))),
        "document_ids": [0] * len(ids),
    }


def forgetting_losses(
    model: Any,
    canary: ForgettingSet,
    *,
    base_loss: float | None = None,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> dict[str, float | None]:
    """`canary_loss`, `canary_base_loss` (nats per labelled token) and `forgetting`, the first minus the second.

    The base is the model with its adapter off. A model without an adapter has none: `base_loss` is what it had before
    training, None (then forgetting is None too) where nobody knows. Modes and flags are as before afterwards.
    """
    loss = held_out_loss(model, canary.batches, autocast=autocast)
    if hasattr(model, "disable_adapter"):
        with adapter_off(model):
            base_loss = held_out_loss(model, canary.batches, autocast=autocast)
    forgetting = None if loss is None or base_loss is None else loss - base_loss
    return {"canary_loss": loss, "canary_base_loss": base_loss, "forgetting": forgetting}


def forgetting_note(forgetting: float | None, gain: float | None) -> str | None:
    """One line when a run forgot much for what it gained, else None.

    Much is: the canary loss rose by more than TOLERATED, and by more than SHARE_OF_GAIN of what the held-out loss fell.
    """
    gain = max(gain or 0.0, 0.0)
    if forgetting is None or forgetting <= max(TOLERATED, SHARE_OF_GAIN * gain):
        return None
    return (
        f"forgetting: the canary loss rose by {forgetting:.2f} while the held-out loss fell by {gain:.2f}; lower "
        "train.learning_rate or train.epochs, or mix general rows into data.train"
    )
