"""Rows behind the embedding and the head of a base, for tokens that it does not know.

Letters: B batch, T tokens, D hidden, A added rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma_ft.model.layers import GemmaScaledEmbedding


class AddedRows(nn.Module):
    """Rows [A, D] of the tokens `first`, `first` + 1, ...: the base's own table ends before them and stays as it is.

    They are tied to the head like all others. `weight` is trained, in float32; `initial` is where it began, and what
    the rows are while they are not `enabled`: the model without what was learned.
    """

    initial: Tensor

    def __init__(self, first: int, initial: Tensor) -> None:
        super().__init__()
        self.first, self.enabled = first, True
        self.weight = nn.Parameter(initial.detach().to(torch.float32, copy=True))
        self.register_buffer("initial", initial.detach().to(torch.float32, copy=True), persistent=False)

    @property
    def rows(self) -> Tensor:
        """The rows [A, D] that count now."""
        return self.weight if self.enabled else self.initial

    def embed(self, ids: Tensor, base: GemmaScaledEmbedding) -> Tensor:
        """Token ids [B, T] -> embeddings [B, T, D], as `base` would give them if its table had these rows as well."""
        known = ids < self.first
        old = base(torch.where(known, ids, 0))
        new = base.scaled(F.embedding(torch.where(known, 0, ids - self.first), self.rows.to(base.weight.dtype)))
        return torch.where(known[..., None], old, new)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, first={self.first}"
