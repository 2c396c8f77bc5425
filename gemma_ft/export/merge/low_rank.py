"""A low-rank change of one weight, and where an adapter's file holds it.

Letters: O rows and I columns of a base weight, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gemma_ft.build.weights import WeightFiles

# How PEFT names the tensors of a layer. Around an embedding [V, D] it keeps both factors the other way round: A is
# [R, V], B is [D, R], and the change is their product transposed.
ENDINGS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_B": "a",
    ".lora_embedding_A": "b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
FIRST_ZERO = (".lora_B.weight", ".lora_embedding_A")  # what has left zero where an adapter was trained


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a weight of `dtype` is merged in: float32, or wider where it is."""
    return torch.promote_types(dtype, torch.float32)


def add_low_rank(weight: Tensor, a: Tensor, b: Tensor, *, scale: float, magnitude: Tensor | None = None) -> Tensor:
    """`weight` [O, I] changed in place to W + scale * B A, for A [R, I] and B [O, R]; returned.

    With a magnitude m [O] (DoRA) each row is then brought to its length: m * (W + scale * B A) / |W + scale * B A|.
    The arithmetic has the dtype of `weight`, which is float32 or wider; no second tensor of its size is made.
    Source: arXiv:2106.09685 eq. 3; arXiv:2402.09353 eq. 5; peft 0.21.2 tuners/lora/layer.py `get_delta_weight`,
    variants.py `DoraLinearVariant.merge_safe`.
    """
    assert weight.dtype == wide(weight.dtype), "a merge in less than float32 loses what was trained"
    weight.addmm_(b.to(weight.dtype), a.to(weight.dtype), alpha=scale)
    if magnitude is not None:
        weight.mul_((magnitude.to(weight.dtype) / torch.linalg.vector_norm(weight, dim=1))[:, None])
    return weight


@dataclass
class LowRank:
    """The names of the tensors that change one weight, and by how much."""

    names: dict[str, str] = field(default_factory=dict)  # a, b, magnitude -> tensor of the adapter
    rank: int = 0
    scale: float = 0.0

    @property
    def missing(self) -> set[str]:
        """Which of the two factors is not there."""
        return {"a", "b"} - self.names.keys()

    def parts(self, files: WeightFiles) -> dict[str, Tensor]:
        """a [R, I], b [O, R], and magnitude [O] where there is one."""
        return {part: _turned(files.tensor(name), name) for part, name in self.names.items()}

    def misfit(self, files: WeightFiles, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]] | None:
        """The first tensor that does not fit a weight of `shape`, and the shape that it should have."""
        rows, *columns = shape
        wanted = {"a": (self.rank, *columns), "b": (rows, self.rank), "magnitude": (rows,)}
        for part, name in self.names.items():
            asked = wanted[part][::-1] if _is_turned(name) else wanted[part]
            if files.info(name).shape != asked:
                return name, asked
        return None


def _is_turned(name: str) -> bool:
    return ".lora_embedding_" in name


def _turned(tensor: Tensor, name: str) -> Tensor:
    return tensor.T if _is_turned(name) else tensor
