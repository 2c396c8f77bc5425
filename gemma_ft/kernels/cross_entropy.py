"""What the LM head's loss does to a chunk of logits: cap, cross-entropy, hits, entropy, and the logits' gradient in
their place.

Letters: M labelled rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gemma_ft.kernels.backend import implementation_of


class HeadRows(NamedTuple):
    """What a chunk of M rows of logits says."""

    losses: Tensor  # -log p of each target [M], float32 or wider
    correct: Tensor  # whether the most likely token is the target, bool [M]
    entropies: Tensor  # of each row's distribution after the cap, nats, [M] as the losses
    gradient: Tensor | None  # of the losses' sum, [M, V] in the logits' dtype; None where nobody asks


def capped(wide: Tensor, cap: float | None) -> tuple[Tensor, Tensor | None]:
    """cap * tanh(logits / cap) of logits that are wide already and may be written over, and the tanh that did it; a cap
    of None changes nothing. Source: arXiv:2408.00118.
    """
    if cap is None:
        return wide, None
    tanh = wide.div_(cap).tanh_()
    return tanh * cap, tanh


def fused_cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor | None, softcap: float | None, *, with_grad: bool
) -> HeadRows:
    """Of raw logits [M, V], which may be written over, and their targets [M].

    `weights` [M] multiply the gradient, not the losses. A target that is no token is an IndexError on a CPU and a loss
    of NaN on a GPU, from which nothing comes back in time.
    """
    fits = logits.is_contiguous() and targets.device == logits.device
    chosen = implementation_of("cross_entropy", logits, fits=fits)
    if chosen.name == "torch":
        return fused_cross_entropy_reference(logits, targets, weights, softcap, with_grad=with_grad)
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    correct = torch.empty(len(logits), dtype=torch.bool, device=logits.device)
    entropies = torch.empty_like(losses)
    each = None if weights is None else weights.float().contiguous()
    chosen.run(logits, targets.long().contiguous(), each, losses, correct, entropies, softcap, with_grad=with_grad)
    return HeadRows(losses, correct, entropies, logits if with_grad else None)


def fused_cross_entropy_reference(
    logits: Tensor, targets: Tensor, weights: Tensor | None, softcap: float | None, *, with_grad: bool
) -> HeadRows:
    """The same in plain torch, in as few passes over memory as there can be."""
    wide, tanh = capped(logits.to(torch.promote_types(logits.dtype, torch.float32)), softcap)
    log_norm = wide.logsumexp(dim=-1)
    losses = log_norm - wide.gather(1, targets[:, None])[:, 0]
    correct = wide.argmax(dim=-1) == targets
    entropies = log_norm - (wide - log_norm[:, None]).exp_().mul_(wide).sum(dim=-1)
    if not with_grad:
        return HeadRows(losses, correct, entropies, None)
    grad = wide.sub_(log_norm[:, None]).exp_()  # softmax
    grad[torch.arange(len(targets), device=logits.device), targets] -= 1.0
    if tanh is not None:
        grad *= tanh.square_().neg_().add_(1.0)  # d cap(z) / dz = 1 - tanh(z / cap)^2
    if weights is not None:
        grad *= weights[:, None].to(grad.dtype)
    return HeadRows(losses, correct, entropies, grad.to(logits.dtype))
