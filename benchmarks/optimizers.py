"""A step of each optimizer on the CPU: torch's fused AdamW, bitsandbytes' own with moments in 8 bits, and ours.

    .venv/bin/python -m benchmarks.optimizers       to benchmarks/results/optimizers.json

Nanoseconds for each weight, over a weight that no cache holds; medians over rounds, arms in turns.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.shared.record import write_result
from benchmarks.shared.turns import QUICK, in_turns

SHAPE, ROUNDS = (4 * 3072, 768), 7


def weight() -> torch.nn.Parameter:
    """One with a gradient."""
    draw = torch.Generator().manual_seed(0)
    found = torch.nn.Parameter(torch.randn(SHAPE, generator=draw) * 0.03)
    found.grad = torch.randn(SHAPE, generator=draw) * 1e-3
    return found


def arms() -> dict[str, Callable[[], Any]]:
    """A step of each, by name."""
    import bitsandbytes

    from gemma_ft.recipe.schema import Train
    from gemma_ft.train.optimizers import optimizer_of

    made: dict[str, Any] = {
        "adamw": torch.optim.AdamW([weight()], lr=1e-4, fused=True),
        "adamw8bit, bitsandbytes": bitsandbytes.optim.AdamW8bit([weight()], lr=1e-4),
        "lion8bit, bitsandbytes": bitsandbytes.optim.Lion8bit([weight()], lr=1e-4),
    }
    for name in ("adamw8bit", "lion8bit"):
        found = optimizer_of(Train(optimizer=name, learning_rate=1e-4))
        assert found is not None
        made[name] = found[0]([weight()], **found[1])
    return {name: one.step for name, one in made.items()}


def seconds(run: Callable[[], Any]) -> float:
    """Of one step."""
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def main(rounds: int = ROUNDS) -> None:
    """All arms, and the result file."""
    steps = arms()
    for run in steps.values():
        run()
    found = in_turns({name: (lambda run=run: seconds(run)) for name, run in steps.items()}, rounds)
    count = SHAPE[0] * SHAPE[1]
    each = {name: round(1e9 * statistics.median(ones) / count, 2) for name, ones in found.items()}
    over = {name: round(one / each["adamw"], 2) for name, one in each.items()}
    print(each, over)
    write_result("optimizers", command="python -m benchmarks.optimizers", weights=count, rounds=rounds,
                 threads=torch.get_num_threads(), nanoseconds_per_weight=each, times_adamw=over)  # fmt: skip


if __name__ == "__main__":
    main(1 if QUICK in sys.argv else ROUNDS)
