"""What one decoder layer keeps for backward, tensor by tensor: the one table to change when a kernel saves less.

tests/plan/test_activations.py holds it to what autograd really saves, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gemma_ft.plan.shape import Shape

# our own in blocks; torch's FlexAttention; torch's own; every score written out
Attention = Literal["blocks", "flex", "sdpa", "scores"]
WIDE = 4  # bytes of float32, in which norms, scores and adapters compute


@dataclass(frozen=True)
class Layer:
    """What decides how much a layer saves for each token."""

    shape: Shape
    tokens: int  # of a sequence: the keys of a query, where every score is written out
    element: int  # bytes of an activation
    attention: Attention
    rank: int = 0
    targets: frozenset[str] = frozenset()  # linear layers with an adapter; none: all weights are trained
    dropout: bool = False  # in front of the adapter
    int8: bool = False
    fused: bool = False  # adapters are adapters/fused_lora.py's: they keep their input as it is
    own_kernels: bool = False  # norms and GeGLU are C++ or Triton: they keep their inputs alone

    @property
    def full(self) -> bool:
        """Whether all weights are trained."""
        return not self.targets

    @property
    def wide(self) -> bool:
        """Whether activations are float32 themselves, so that nothing is copied to be wide."""
        return self.element == WIDE

    def copies(self, *names: str) -> int:
        """Wide copies of the input that these linear layers share: PEFT makes one for each adapter, or takes the input
        itself where it is wide.
        """
        if self.fused:
            return 0
        adapters = sum(name in self.targets for name in names)
        return min(adapters, 1) if self.wide and not self.dropout else adapters

    def adapted(self, *names: str) -> int:
        """How many of these linear layers have an adapter."""
        return sum(name in self.targets for name in names)


def _always(_: Layer) -> bool:
    return True


def _input(*names: str) -> Callable[[Layer], bool]:
    """Whether linear layers that share an input keep it as it is."""
    # bitsandbytes' int8 layer keeps its input too
    return lambda at: at.full or at.int8 or (at.fused and at.adapted(*names) > 0)


def _scores(at: Layer) -> bool:
    return at.attention == "scores"


@dataclass(frozen=True)
class Saved:
    """One saved tensor: elements for each token, bytes of each (None: an activation's), and when it is there."""

    name: str
    elements: Callable[[Layer], int]
    each: int | None = None
    when: Callable[[Layer], bool] = _always

    def bytes(self, at: Layer) -> int:
        """Bytes for each token."""
        return self.elements(at) * (self.each or at.element) if self.when(at) else 0


SAVED = (
    Saved("input of each norm", lambda at: at.shape.normed, each=WIDE, when=lambda at: not at.own_kernels),
    Saved("the same in C++ or Triton", lambda at: at.shape.normed, when=lambda at: at.own_kernels),
    Saved("1 / rms of each row", lambda at: at.shape.normed_rows, each=WIDE),
    Saved("normed, of trained norms", lambda at: at.shape.normed, each=WIDE,
          when=lambda at: at.full and not at.own_kernels),
    Saved("input of q, k, v", lambda at: at.shape.hidden, when=_input("q_proj", "k_proj", "v_proj")),
    Saved("the same for adapters", lambda at: at.copies("q_proj", "k_proj", "v_proj") * at.shape.hidden, each=WIDE),
    Saved("q, k rotated, v", lambda at: (at.shape.heads + 2 * at.shape.kv_heads) * at.shape.head_dim),
    Saved("log-sum-exp", lambda at: at.shape.heads, each=WIDE, when=lambda at: not _scores(at)),
    Saved("mask in q's dtype", lambda at: at.tokens, when=lambda at: at.attention == "sdpa"),
    Saved("output of attention", lambda at: at.shape.heads * at.shape.head_dim,
          when=lambda at: at.attention in ("sdpa", "flex")),
    Saved("scores after tanh", lambda at: at.shape.heads * at.tokens, each=WIDE,
          when=lambda at: _scores(at) and at.shape.attn_softcap),
    Saved("what is hidden", lambda at: at.tokens, each=1, when=_scores),
    Saved("attention weights", lambda at: at.shape.heads * at.tokens, each=WIDE, when=_scores),
    Saved("the same in v's dtype", lambda at: at.shape.heads * at.tokens, when=lambda at: _scores(at) and not at.wide),
    Saved("input of o", lambda at: at.shape.heads * at.shape.head_dim,
          when=lambda at: _input("o_proj")(at) and (at.attention != "sdpa" or at.int8 or at.own_kernels)),
    Saved("the same for adapters", lambda at: at.copies("o_proj") * at.shape.heads * at.shape.head_dim, each=WIDE,
          when=lambda at: at.attention != "sdpa" or not at.wide or at.dropout),
    Saved("input of gate, up", lambda at: at.shape.hidden, when=_input("gate_proj", "up_proj")),
    Saved("the same for adapters", lambda at: at.copies("gate_proj", "up_proj") * at.shape.hidden, each=WIDE),
    Saved("gate, up", lambda at: 2 * at.shape.ffn),
    Saved("gelu(gate)", lambda at: at.shape.ffn, when=lambda at: not at.own_kernels),
    Saved("input of down", lambda at: at.shape.ffn, when=_input("down_proj")),
    Saved("the same for adapters", lambda at: at.copies("down_proj") * at.shape.ffn, each=WIDE),
    Saved("A x of each adapter", lambda at: at.rank * len(at.targets), each=WIDE, when=lambda at: not at.fused),
    Saved("the same, fused", lambda at: at.rank * len(at.targets), when=lambda at: at.fused),
    Saved("dropout's masks", lambda at: sum(at.shape.linears[name][1] for name in at.targets), each=WIDE,
          when=lambda at: at.dropout),
)  # fmt: skip


def saved_bytes(at: Layer) -> int:
    """Bytes for each token that a layer keeps for backward."""
    return sum(one.bytes(at) for one in SAVED)


def checkpointed_bytes(at: Layer) -> int:
    """Bytes for each token that a checkpointed layer keeps: its input."""
    return at.shape.hidden * at.element


def workspace_bytes(at: Layer) -> int:
    """Bytes for each token that come and go in a layer's backward, beside what it kept: gradients of the MLP's product
    and of its parts, in adapters also their wide copies, or gradients of scores that are written out; and the
    residual's.
    """
    copies = 0 if at.full or at.wide else at.element if at.fused else WIDE
    ffn = at.shape.ffn * (2 * at.element + copies)
    scores = 3 * WIDE * at.shape.heads * at.tokens if _scores(at) else 0
    return max(ffn, scores) + 3 * at.shape.hidden * (at.element if at.own_kernels else WIDE)
