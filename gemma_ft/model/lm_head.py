"""The LM head fused with its loss: labelled rows in, loss sum out, never the logits of a whole sequence.

Letters: M labelled rows, D hidden, V vocabulary, A rows added to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemma_ft.kernels.cross_entropy import capped, fused_cross_entropy
from gemma_ft.kernels.matmul import times, times_transposed
from gemma_ft.system.limits import CHUNK_BYTES, CPU_BYTES, CPU_ROWS, IGNORE, ROWS_NUMBERS

# What multiplies the loss of each token, [B, T], of either sign; a function gives it for the labels' log-probabilities.
TokenWeights = Tensor | Callable[[Tensor], Tensor] | None


def softcapped(logits: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(logits / cap), in float32 or wider; `cap` None changes nothing but the dtype. Source:
    arXiv:2408.00118.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    return capped(logits.to(wide, copy=cap is not None), cap)[0]


@dataclass(frozen=True)
class HeadLoss:
    """What the fused head gives: five scalars on the hidden states' device."""

    loss_sum: Tensor  # weighted cross-entropy summed over labelled tokens, float32 or wider, differentiable
    weight_sum: Tensor  # weights of labelled tokens, summed, in loss_sum's dtype: `token_count` where none is given
    token_count: Tensor  # labelled tokens, int64
    correct_count: Tensor  # labelled tokens whose most likely prediction is the label, int64
    entropy_sum: Tensor  # nats: of what is predicted for labelled tokens, summed, in loss_sum's dtype, not weighted


def fused_head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    softcap: float | None,
    loss_weights: TokenWeights = None,
    added: Tensor | None = None,
    chunk_rows: int | None = None,
) -> HeadLoss:
    """Hidden states [B, T, D] and labels [B, T] -> the summed next-token loss of a linear head `weight` [V, D], with
    the rows `added` [A, D] behind it.

    The label at t is predicted from t - 1, and its loss is multiplied by the loss weight at t (None: 1), given or
    made of `fused_token_logprobs`; rows whose label is -100 are never projected. Logits exist for `chunk_rows`
    rows at a time (default: as many as fit CHUNK_BYTES), are capped in float32 or wider, and their gradient is taken at
    once, so that nothing of size V is kept for backward when the head is frozen (a trained head keeps its own gradient,
    [V, D]). Where weights are made of log-probabilities, a frozen head gives those and each row's gradient in one pass,
    and a weight multiplies what is there; a trained one, whose gradient is a sum over rows, takes a second pass.
    """
    chunk_rows = chunk_rows or rows_at_a_time(weight.shape[0], weight.device)
    rows, targets = labelled_rows(hidden, labels)
    if not torch.is_grad_enabled():  # inside an autograd function this can no longer be seen
        rows, weight, added = rows.detach(), weight.detach(), None if added is None else added.detach()
    if callable(loss_weights):
        trained = weight.requires_grad or (added is not None and added.requires_grad)
        with_grad = rows.requires_grad and not trained
        scored = _scored(rows, weight, added, targets, softcap, chunk_rows, with_grad=with_grad)
        each = weights_of_rows(labels, loss_weights(in_place(labels, scored.losses)))
        if not trained:
            loss_sum = _WeightedLoss.apply(rows, scored.losses, scored.gradients, each, chunk_rows)
            return head_loss(loss_sum, scored.correct, scored.entropy, targets, each)
    else:
        each = weights_of_rows(labels, loss_weights)
    loss_sum, correct, entropy = _FusedHeadLoss.apply(rows, weight, added, targets, each, softcap, chunk_rows)
    return head_loss(loss_sum, correct, entropy, targets, each)


@torch.no_grad()
def fused_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    softcap: float | None,
    added: Tensor | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Hidden states [B, T, D] and labels [B, T] -> log p of the label at t given what is before it, [B, T] in float32
    or wider, 0 where the label is -100; without gradients. The logits are those of `fused_head_loss`, to the bit.
    """
    rows, targets = labelled_rows(hidden, labels)
    chunk_rows = chunk_rows or rows_at_a_time(weight.shape[0], weight.device)
    return in_place(labels, _scored(rows, weight, added, targets, softcap, chunk_rows, with_grad=False).losses)


def labelled_rows(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The rows [M, D] whose next token is labelled, and those labels [M]."""
    targets = labels[:, 1:]
    labelled = targets != IGNORE
    return hidden[:, :-1][labelled], targets[labelled]


def weights_of_rows(labels: Tensor, loss_weights: Tensor | None) -> Tensor | None:
    """The loss weights [M] of the labelled tokens, of those of all [B, T]."""
    return None if loss_weights is None else loss_weights[:, 1:][labels[:, 1:] != IGNORE]


def in_place(labels: Tensor, losses: Tensor) -> Tensor:
    """Losses [M] of the labelled rows -> their negatives where the labels are, [B, T]; 0 elsewhere."""
    found = torch.zeros(labels.shape, dtype=losses.dtype, device=labels.device)
    found[:, 1:][labels[:, 1:] != IGNORE] = -losses
    return found


@dataclass(frozen=True)
class _Scored:
    """What a frozen head says of M labelled rows."""

    losses: Tensor  # -log p of each label [M], float32 or wider
    correct: Tensor  # rows whose most likely token is the label, int64
    entropy: Tensor  # of all rows, summed, as the losses
    gradients: Tensor | None  # of each row's own loss by the row, [M, D] in the rows' dtype; None where nobody asks


@torch.no_grad()
def _scored(
    rows: Tensor,
    weight: Tensor,
    added: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    chunk_rows: int,
    *,
    with_grad: bool,
) -> _Scored:
    head, more = weight.to(rows.dtype), None if added is None else added.to(rows.dtype)
    losses = torch.empty(len(rows), dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
    correct = torch.zeros((), dtype=torch.int64, device=rows.device)
    entropy = torch.zeros((), dtype=losses.dtype, device=rows.device)
    gradients = torch.empty_like(rows) if with_grad else None
    for start in range(0, len(rows), chunk_rows):
        chunk = slice(start, start + chunk_rows)
        raw = _raw_logits(rows[chunk], head, more)
        losses[chunk], hits, spread, grad = fused_cross_entropy(raw, targets[chunk], None, softcap, with_grad=with_grad)
        correct += hits.sum()
        entropy += spread.sum()
        if gradients is not None and grad is not None:
            _write_row_gradients(gradients[chunk], grad.to(rows.dtype), head, more)
    return _Scored(losses, correct, entropy, gradients)


def _write_row_gradients(into: Tensor, grad: Tensor, head: Tensor, added: Tensor | None) -> None:
    """Gradients of logits [m, V + A] -> those of their rows, written into [m, D]."""
    into.copy_(times(grad[:, : len(head)], head))
    if added is not None:
        into += grad[:, len(head) :] @ added


def _raw_logits(part: Tensor, head: Tensor, added: Tensor | None) -> Tensor:
    """Rows [m, D] -> their logits [m, V], with the added tokens [m, V + A], not capped."""
    raw = times_transposed(part, head)
    return raw if added is None else torch.cat((raw, part @ added.T), dim=1)


def rows_at_a_time(words: int, device: torch.device) -> int:
    """How many rows of logits of so many words exist at a time."""
    most = max(16, CHUNK_BYTES // (4 * words))
    return min(most, max(CPU_ROWS, CPU_BYTES // (4 * words))) if device.type == "cpu" else most


def _add_wide(total: Tensor, narrow: Tensor) -> None:
    """total += narrow, [V, D]; on a CPU in pieces, for torch makes a wide copy there of all that it is to add."""
    rows = max(1, ROWS_NUMBERS // total.shape[1]) if total.is_cpu else len(total)
    for into, piece in zip(total.split(rows), narrow.split(rows), strict=True):
        into += piece


def head_loss(loss_sum: Tensor, correct: Tensor, entropy: Tensor, targets: Tensor, each: Tensor | None) -> HeadLoss:
    count = torch.full((), len(targets), device=targets.device)
    return HeadLoss(loss_sum, (count if each is None else each.sum()).to(loss_sum.dtype), count, correct, entropy)


class _WeightedLoss(torch.autograd.Function):
    """(rows [M, D], their losses [M] and gradients [M, D], loss weights [M]) -> the weighted sum. The weight and what
    comes from above multiply a gradient in one rounding.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, losses: Tensor, gradients: Tensor | None, each: Tensor, chunk_rows: int
    ) -> Tensor:
        ctx.save_for_backward(gradients, each)
        loss_sum = torch.zeros((), dtype=losses.dtype, device=losses.device)
        for some, weights in zip(losses.split(chunk_rows), each.to(losses.dtype).split(chunk_rows), strict=True):
            loss_sum += (some * weights).sum()  # in the order of `_FusedHeadLoss`
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, each = ctx.saved_tensors
        scales = each.to(upstream.dtype) * upstream  # [M]
        return torch.mul(gradients, scales[:, None], out=torch.empty_like(gradients)), None, None, None, None


class _FusedHeadLoss(torch.autograd.Function):
    """(rows [M, D], weight [V, D], added [A, D] or None, targets [M], loss weights [M] or None) -> (loss sum, correct
    count, entropy sum); gradients are ready when forward returns.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        added: Tensor | None,
        targets: Tensor,
        loss_weights: Tensor | None,
        softcap: float | None,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(rows.dtype, torch.float32)
        head = weight.to(rows.dtype)
        more = None if added is None else added.to(rows.dtype)
        known = len(weight)
        grad_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        grad_added = torch.zeros_like(added, dtype=wide) if added is not None and ctx.needs_input_grad[2] else None
        with_grad = any(one is not None for one in (grad_rows, grad_weight, grad_added))
        loss_sum = torch.zeros((), dtype=wide, device=rows.device)
        entropy = torch.zeros_like(loss_sum)
        correct = torch.zeros((), dtype=torch.int64, device=rows.device)
        for start in range(0, rows.shape[0], chunk_rows):
            part, target = rows[start : start + chunk_rows], targets[start : start + chunk_rows]
            raw = _raw_logits(part, head, more)
            each = None if loss_weights is None else loss_weights[start : start + chunk_rows]
            losses, hits, spread, grad = fused_cross_entropy(raw, target, each, softcap, with_grad=with_grad)
            del raw  # and grad below: bound still, they would live beside the next chunk's logits
            loss_sum += (losses if each is None else losses * each.to(losses.dtype)).sum()
            correct += hits.sum()
            entropy += spread.sum()
            if grad is None:
                continue
            grad = grad.to(rows.dtype)  # autocast may have made narrower logits
            if grad_rows is not None:
                _write_row_gradients(grad_rows[start : start + chunk_rows], grad, head, more)
            if grad_weight is not None:
                _add_wide(grad_weight, grad[:, :known].T @ part)
            if grad_added is not None:
                grad_added += grad[:, known:].T @ part
            del grad
        ctx.save_for_backward(grad_rows, grad_weight, grad_added)
        ctx.dtypes = rows.dtype, weight.dtype, None if added is None else added.dtype
        ctx.mark_non_differentiable(correct, entropy)
        return loss_sum, correct, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads = (
            None if grad is None else (grad * upstream).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *grads, None, None, None, None
