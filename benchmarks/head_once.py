"""The head's loss where the weights of tokens are made of their log-probabilities, as preferences have it: logits made
once, and made twice. Writes benchmarks/results/head_once.json.

    .venv/bin/python -m benchmarks.head_once

Arms in turns; CPU seconds of the process, forward and backward of bf16 rows before a frozen head, and ratios by pairs.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.shared.record import write_result
from benchmarks.shared.turns import QUICK, in_turns, paired

ROWS, CAP = 512, 30.0
SHAPES = ((32_768, 768), (262_144, 640))  # words and hidden size: the CPU benchmark's head, Gemma 3 270M's
ROUNDS = 7


def push(logprobs: Tensor) -> Tensor:
    """Weights of either sign that depend on what they weigh."""
    return torch.sigmoid(logprobs) - 0.5


def measured(words: int, width: int, rounds: int) -> dict[str, Any]:
    """Both arms on one head."""
    from gemma_ft.model.lm_head import fused_head_loss, fused_token_logprobs

    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(words, width, generator=draw).mul_(2 / width**0.5).bfloat16()
    hidden = torch.randn(1, ROWS + 1, width, generator=draw).bfloat16().requires_grad_()
    labels = torch.randint(0, words, (1, ROWS + 1), generator=draw)

    def once() -> Tensor:
        return fused_head_loss(hidden, weight, labels, softcap=CAP, loss_weights=push).loss_sum

    def twice() -> Tensor:
        weights = push(fused_token_logprobs(hidden, weight, labels, softcap=CAP))
        return fused_head_loss(hidden, weight, labels, softcap=CAP, loss_weights=weights).loss_sum

    def seconds(arm: Callable[[], Tensor]) -> float:
        begun = time.process_time()
        torch.autograd.grad(arm(), hidden)
        return time.process_time() - begun

    arms = {"one pass": lambda: seconds(once), "two passes": lambda: seconds(twice)}
    for run in arms.values():
        run()
    found = in_turns(arms, rounds)
    return {
        "words": words,
        "width": width,
        "seconds": {name: round(statistics.median(ones), 3) for name, ones in found.items()},
        "one over two": paired(found["one pass"], found["two passes"]),
    }


def main(*, rounds: int = ROUNDS) -> None:
    """All shapes, and the result file."""
    from gemma_ft.system import environment

    environment.quiet_libraries()
    write_result("head_once", command="python -m benchmarks.head_once", threads=torch.get_num_threads(), rows=ROWS,
                 softcap=CAP, rounds=rounds, heads=[measured(*shape, rounds) for shape in SHAPES])  # fmt: skip


if __name__ == "__main__":
    main(rounds=1 if QUICK in sys.argv else ROUNDS)
