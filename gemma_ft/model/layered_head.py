"""The LM head and its loss for a head that is more than one weight, such as one with an adapter around it.

Letters: B sequences, T tokens, M labelled rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from gemma_ft.model.lm_head import (
    HeadLoss,
    TokenWeights,
    head_loss,
    in_place,
    labelled_rows,
    rows_at_a_time,
    weights_of_rows,
)


@torch.no_grad()
def layered_token_logprobs(
    logits: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, *, words: int, chunk_rows: int | None = None
) -> Tensor:
    """As `fused_token_logprobs`, for the heads of `layered_head_loss`, whose next pass draws the same dropout."""
    rows, targets = labelled_rows(hidden, labels)
    chunk_rows = chunk_rows or rows_at_a_time(words, rows.device)
    with torch.random.fork_rng(devices=[rows.device] if rows.is_cuda else []):
        losses = [
            cross_entropy(logits(part), target, reduction="none")
            for part, target in zip(rows.split(chunk_rows), targets.split(chunk_rows), strict=True)
        ]
    return in_place(labels, torch.cat(losses))


def layered_head_loss(
    logits: Callable[[Tensor], Tensor],
    hidden: Tensor,
    labels: Tensor,
    *,
    words: int,
    loss_weights: TokenWeights = None,
    chunk_rows: int | None = None,
) -> HeadLoss:
    """As `fused_head_loss`, for a head that is more than one weight, such as one with an adapter around it.

    `logits`: rows [m, D] -> capped logits [m, V], differentiable; `words`: V. They exist for `chunk_rows` rows at a
    time here too, and are made once more for backward.
    """
    chunk_rows = chunk_rows or rows_at_a_time(words, hidden.device)
    if callable(loss_weights):
        loss_weights = loss_weights(layered_token_logprobs(logits, hidden, labels, words=words, chunk_rows=chunk_rows))
    (rows, targets), each = labelled_rows(hidden, labels), weights_of_rows(labels, loss_weights)

    def part(start: int, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found, target = logits(rows), targets[start : start + chunk_rows]
        losses = cross_entropy(found, target, reduction="none")
        if each is not None:
            losses = losses * each[start : start + chunk_rows].to(losses.dtype)
        likely = found.detach().log_softmax(-1)
        return losses.sum(), (likely.argmax(-1) == target).sum(), -(likely.exp() * likely).sum()

    sums = torch.zeros((), dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
    entropy = torch.zeros_like(sums)
    correct = torch.zeros((), dtype=torch.int64, device=rows.device)
    for start in range(0, max(len(rows), 1), chunk_rows):  # without a label too: a loss of 0 that has a gradient
        some = rows[start : start + chunk_rows]
        if torch.is_grad_enabled():
            loss, hits, spread = checkpoint(part, start, some, use_reentrant=False)
        else:
            loss, hits, spread = part(start, some)
        sums, correct, entropy = sums + loss, correct + hits, entropy + spread
    return head_loss(sums, correct, entropy, targets, each)
