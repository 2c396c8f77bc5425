"""The loss of held-out rows, token by token: conversations by their labelled answers, documents by all their tokens.

Every sequence a model sees begins with exactly one BOS, each window of a long document too, as in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemma_ft.adapters.trainable_tokens import native_of
from gemma_ft.data.conversation import Item, PlainText
from gemma_ft.data.encode.chat import ChatEncoder, Encoded
from gemma_ft.data.pack.arrange import DataStats, prepare
from gemma_ft.data.pack.collate import Collator
from gemma_ft.data.pack.text_windows import windows
from gemma_ft.errors import DataError, UserError
from gemma_ft.evaluate.statistics import Floats
from gemma_ft.model.lm_head import HeadLoss
from gemma_ft.system.limits import IGNORE


@dataclass(frozen=True)
class Piece:
    """A sequence to be scored: its ids, labels (IGNORE where nothing is counted), and the row it belongs to."""

    input_ids: list[int]
    labels: list[int]
    row: int


@dataclass(frozen=True)
class Pieces:
    """What is scored: the pieces of all rows, how many rows they make, and what became of the rows that came in.

    `single_document`: all pieces are windows of one text, so that windows, not rows, are what is resampled.
    """

    pieces: list[Piece]
    rows: int
    stats: DataStats
    single_document: bool


def pieces_of(items: Sequence[Item], encoder: ChatEncoder, *, max_seq_len: int, window: int, stride: int) -> Pieces:
    """The sequences in which items are scored: a conversation as it is trained (cut at `max_seq_len`), a document in
    windows of at most `window` tokens, BOS included, that begin every `stride` tokens.

    Each token of a document is counted once, with at least `window` - 1 - `stride` tokens of text before it from the
    second window on. A stride that leaves no overlap gives the chunks that training makes.
    """
    texts = [item for item in items if isinstance(item, PlainText) and item.text.strip()]
    chats = [item for item in items if not isinstance(item, PlainText)]
    stats = DataStats(rows=len(items), max_seq_len=max_seq_len)
    pieces: list[Piece] = []
    if chats:
        found = prepare(chats, encoder, max_seq_len=max_seq_len, packing=False)
        stats = found.stats
        pieces = [Piece(one["input_ids"], one["labels"], row) for row, one in enumerate(found.examples)]
        stats.rows = len(items)
    stats.dropped_empty += len(items) - len(chats) - len(texts)
    first = len(pieces)
    for row, one in enumerate(encoder.encode_documents(texts), start=first):
        pieces += [Piece(ids, labels, row) for ids, labels in _windowed(one, window, stride)]
    return Pieces(pieces, first + len(texts), stats, single_document=first == 0 and len(texts) == 1)


def _windowed(one: Encoded, window: int, stride: int) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of a document's windows: BOS and context first, which are not counted, then the new tokens."""
    bos, body = one.input_ids[0], one.input_ids[1:]
    size = window - 1
    return [
        (
            [bos, *body[cut.start : cut.end]],
            [IGNORE] * (1 + cut.new - cut.start) + body[cut.new : cut.end],
        )
        for cut in windows(len(body), size=size, stride=min(stride, size))
    ]


def piece_losses(
    model: Any, pieces: Sequence[Piece], *, pad_id: int, batch_size: int, on_progress: Callable[[int], None]
) -> Floats:
    """The summed loss and the count of counted tokens of each piece, [pieces, 2], in their order.

    Pieces of similar length share a batch. Hears how many are done after each batch. Raises: UserError when a loss is
    not finite.
    """
    losses = np.zeros((len(pieces), 2))
    order = sorted(range(len(pieces)), key=lambda index: -len(pieces[index].input_ids))
    collate = Collator(pad_id)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([example_of(pieces[index]) for index in chosen])
        for index, head in zip(chosen, row_losses(model, batch), strict=True):
            losses[index] = float(head.loss_sum), int(head.token_count)
        on_progress(len(chosen))
    if not np.isfinite(losses).all():
        raise UserError("the held-out loss is not finite: the model's weights are damaged")
    return losses


def loss_rows(losses: Floats, pieces: Pieces) -> Floats:
    """Losses of pieces [pieces, 2] summed to what is resampled [N, 2]: rows, or the windows of a single document."""
    if pieces.single_document:
        return losses
    rows = np.zeros((pieces.rows, 2))
    np.add.at(rows, [piece.row for piece in pieces.pieces], losses)
    return rows


@torch.no_grad()
def row_losses(model: Any, batch: dict[str, Tensor]) -> list[HeadLoss]:
    """The head's figures of each row of a batch: input_ids and labels [B, T], attention_mask, position_ids.

    Only labelled tokens meet the head, some hundreds at a time: logits of a sequence are never built or kept. The model
    may be one that PEFT wrapped: what is switched on is what is scored. It has to be in eval mode.
    """
    states = final_states(model, {name: tensor for name, tensor in batch.items() if name != "labels"})
    return [head_loss(model, states[row], labels) for row, labels in enumerate(batch["labels"])]


@torch.no_grad()
def final_states(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The hidden states [B, T, D] that the head is given, on the model's device."""
    native = native_of(model)
    device = native.lm_head.weight.device
    states: Tensor = native.model(
        **{name: tensor.to(device) for name, tensor in inputs.items()}, use_cache=False
    ).last_hidden_state
    return states


@torch.no_grad()
def head_loss(model: Any, states: Tensor, labels: Tensor) -> HeadLoss:
    """The summed loss of one row's labels [T], its labelled tokens, and how many of them are the likeliest ones, out of
    the row's final states [T, D].
    """
    found: HeadLoss = native_of(model).head_loss(states[None], labels[None].to(states.device))
    return found


def example_of(piece: Piece) -> dict[str, list[int]]:
    """A piece as the collator takes it: one document, whose positions count from 0."""
    length = len(piece.input_ids)
    return {
        "input_ids": piece.input_ids,
        "labels": piece.labels,
        "position_ids": list(range(length)),
        "document_ids": [0] * length,
    }


def check_window(window: int, stride: int, context: int) -> None:
    """Raises DataError for windows that a model cannot read, or that would leave tokens out."""
    if not 3 <= window <= context:
        raise DataError(f"--window: expected 3 to {context} tokens, the context of the model, got {window}")
    if not 1 <= stride <= window:
        raise DataError(f"--stride: expected 1 to {window} tokens, the window, got {stride}; more would leave text out")
