"""Matrix products with bf16 and NF4 weights on the CPU, by torch and by ours: many rows, few rows, and dequantizing.
Writes benchmarks/results/products.json: the reasons for the constants of kernels/matmul.py and kernels/gemv.py.

    .venv/bin/python -m benchmarks.products

Several weights take turns, so that no cache holds them; times are medians over rounds, arms in turns.
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
from benchmarks.shared.turns import QUICK, in_turns

SHAPE, WEIGHTS = (3072, 768), 24  # [O, I] of one, and how many: 113 MB in bf16
MANY, FEW = (64, 128, 256, 512, 2048), (1, 2, 4, 8, 12, 16)
ROUNDS = 7


def seconds(run: Callable[[], Any]) -> float:
    """Of one round."""
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def medians(arms: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds of each arm, once for every weight."""
    for run in arms.values():
        run()
    found = in_turns({name: (lambda run=run: seconds(run)) for name, run in arms.items()}, rounds)
    return {name: round(1e3 * statistics.median(ones), 2) for name, ones in found.items()}


def many_rows(weights: list[Tensor], rounds: int) -> dict[str, dict[str, float]]:
    """Products as torch has them, and computed in float32."""
    from gemma_ft.kernels import matmul

    found = {}
    outputs, inputs = SHAPE
    for rows in MANY:
        x, up = torch.randn(rows, inputs).bfloat16(), torch.randn(rows, outputs).bfloat16()
        found[str(rows)] = medians(
            {
                "torch": lambda x=x: [x @ one.T for one in weights],
                "in float32": lambda x=x: [matmul.widened_transposed(x, one) for one in weights],
                "torch, backward": lambda up=up: [up @ one for one in weights],
                "in float32, backward": lambda up=up: [matmul.widened(up, one) for one in weights],
            },
            rounds,
        )
    return found


def gemv(weights: list[Tensor], packed: list[tuple[Tensor, Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Products of as many rows as decoding has."""
    from gemma_ft.kernels import cpp_backend, gemv
    from gemma_ft.kernels.nf4 import dequantize_nf4, nf4_product

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        out = torch.empty(len(x), len(weight), dtype=x.dtype)
        cpp_backend.call("gemv", weight, x, out, len(x), *weight.shape, of=x.dtype)
        return out

    found, place = {}, torch.empty(SHAPE, dtype=torch.bfloat16)
    for rows in FEW:
        x = torch.randn(rows, SHAPE[1]).bfloat16()
        assert torch.allclose(ours(x, weights[0]).float(), (x @ weights[0].T).float(), rtol=0.1, atol=0.1)
        found[str(rows)] = medians(
            {
                "torch": lambda x=x: [gemv.weight_first(x, one) for one in weights],
                "ours": lambda x=x: [ours(x, one) for one in weights],
                "nf4, dequantized first": lambda x=x: [
                    gemv.weight_first(x, dequantize_nf4(*one, out=place)) for one in packed
                ],
                "nf4, ours": lambda x=x: [nf4_product(x, *one) for one in packed],
            },
            rounds,
        )
    return found


def dequantizing(packed: list[tuple[Tensor, Any]], rounds: int) -> dict[str, float]:
    """NF4 -> bf16."""
    from bitsandbytes.functional import dequantize_4bit

    from gemma_ft.kernels.nf4 import dequantize_nf4

    place = torch.empty(SHAPE, dtype=torch.bfloat16)
    arms = {
        "bitsandbytes": lambda: [dequantize_4bit(*one) for one in packed],
        "ours": lambda: [dequantize_nf4(*one) for one in packed],
        "ours, into kept memory": lambda: [dequantize_nf4(*one, out=place) for one in packed],
    }
    return medians(arms, rounds)


@torch.no_grad()
def main(*, rounds: int = ROUNDS) -> None:
    """All tables, and the result file."""
    from bitsandbytes.functional import quantize_4bit

    from gemma_ft.system import environment

    environment.quiet_libraries()
    torch.manual_seed(0)
    weights = [torch.randn(SHAPE).bfloat16() for _ in range(WEIGHTS)]
    packed = [quantize_4bit(one, quant_type="nf4", compress_statistics=True) for one in weights]
    write_result("products", command="python -m benchmarks.products", threads=torch.get_num_threads(),
                 weight=list(SHAPE), weights=WEIGHTS, rounds=rounds, unit="ms for all weights",
                 dequantize=dequantizing(packed, rounds), few_rows=gemv(weights, packed, rounds),
                 many_rows=many_rows(weights, rounds))  # fmt: skip


if __name__ == "__main__":
    main(rounds=1 if QUICK in sys.argv else ROUNDS)
