"""How far a run has come, and who hears of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gemma_ft.train.held_out_objective import HeldOutScore


@dataclass
class Progress:
    """What a run has done so far, over all of its resumes; part of every checkpoint."""

    step: int = 0
    tokens: int = 0  # non-pad input tokens
    seconds: float = 0.0  # in optimizer steps; evaluation and saving are not counted
    last_loss: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # figures of the caller that a resumed run needs again


@dataclass
class Listener:
    """Who hears of a run: of every optimizer step (step, loss, learning_rate, grad_norm, tokens, tokens_per_second), of
    each evaluation on the way, and of what went wrong and ends nothing.
    """

    on_step: Callable[[dict[str, Any]], None] = lambda figures: None
    on_eval: Callable[[int, HeldOutScore], None] = lambda step, score: None
    on_fault: Callable[[str], None] = lambda line: None
