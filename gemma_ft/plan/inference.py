"""What a model takes that is only asked: weights, keys and values of one sequence, and what a pass needs meanwhile."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gemma_ft.plan import parts
from gemma_ft.plan.gpus import smallest_gpu
from gemma_ft.plan.run import Run
from gemma_ft.plan.shape import Shape
from gemma_ft.plan.storage import Kind, cache_bytes, weight_bytes

KINDS: tuple[Kind, ...] = ("bf16", "int8", "nf4")
CONTEXTS = (1024, 4096, 8192)  # tokens of prompt and answer


@dataclass(frozen=True)
class Asked:
    """Bytes of one model, quantization and context on a GPU."""

    weights: int
    cache: int
    workspace: int
    overhead: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.cache + self.workspace + self.overhead


def asked(shape: Shape, kind: Kind, tokens: int, *, rows: int = 1) -> Asked:
    """What `rows` sequences of so many tokens take on a GPU, computed in bf16 by infer.engine."""
    run = Run(
        shape=shape,
        strategy="lora",
        quantize=kind if kind in ("int8", "nf4") else None,
        micro_batch_size=rows,
        tokens=max(tokens - 1, 1),
        eval_rows=rows,
        new_tokens=1,
    )
    return Asked(
        weights=weight_bytes(shape, kind),
        cache=cache_bytes(shape, tokens, rows=rows),
        workspace=parts.prefill(run),
        overhead=parts.overhead(run),
    )


@dataclass(frozen=True)
class Line:
    """A line of the table: totals for those of CONTEXTS that the model reaches, and the smallest GPU for each, in
    nominal GiB (None: none).
    """

    name: str
    kind: Kind
    weights: int
    totals: tuple[int, ...]
    gpus: tuple[int | None, ...]


def table(shapes: Iterable[Shape]) -> list[Line]:
    """Models x quantization x context."""
    lines = []
    for shape in shapes:
        for kind in KINDS:
            reached = (tokens for tokens in CONTEXTS if tokens <= shape.max_positions)
            totals = tuple(asked(shape, kind, tokens).total for tokens in reached)
            gpus = tuple(smallest_gpu(total) for total in totals)
            lines.append(Line(shape.name, kind, weight_bytes(shape, kind), totals, gpus))
    return lines
