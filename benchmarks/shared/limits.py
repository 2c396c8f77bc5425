"""What a machine could do at best: FLOPs of a token in training, the rate of its matrix products, of its memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def linear_parameters(config: Any) -> int:
    """Parameters of all linear layers but the head."""
    d, f, h = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    return int(config.num_hidden_layers * (2 * d * heads * h + 2 * d * kv * h + 3 * d * f))


def adapter_parameters(config: Any, rank: int) -> int:
    """Parameters of LoRA on all linear layers but the head."""
    d, f, h = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    return int(config.num_hidden_layers * rank * (2 * (d + heads * h) + 2 * (d + kv * h) + 3 * (d + f)))


def keys_seen(lengths: Sequence[int], window: int | None) -> float:
    """Keys that an average query of documents of these lengths sees, causal and within the window."""
    pairs = sum(n * (n / 2 if window is None or n <= window else window - window**2 / (2 * n)) for n in lengths)
    return pairs / sum(lengths)


def attention_flops(config: Any, lengths: Sequence[int]) -> float:
    """FLOPs of a token in the forward of all attentions: scores, and their product with the values."""
    from gemma_ft.model.config import GemmaNumerics

    each = 4 * config.num_attention_heads * config.head_dim
    return float(sum(each * keys_seen(lengths, one) for one in GemmaNumerics.from_config(config).window_tokens))


def flops_per_token(
    config: Any, lengths: Sequence[int], *, rank: int, labelled: float = 1.0, full: bool = False
) -> float:
    """4N + 6P + 3.5A + 4Ef of a token in a step of LoRA, whose frozen weights have no gradient and are read twice.

    N linear parameters, P those of the adapter, A attention's forward, E the head's parameters, f the labelled part.
    `full`: all weights are trained, 6N + 3.5A + 6Ef. Recomputing is not counted: it is what checkpointing costs.
    `lengths`: of the documents.
    """
    head = config.vocab_size * config.hidden_size
    frozen, adapter = linear_parameters(config), adapter_parameters(config, rank)
    if full:
        return 6 * frozen + 3.5 * attention_flops(config, lengths) + 6 * head * labelled
    return 4 * frozen + 6 * adapter + 3.5 * attention_flops(config, lengths) + 4 * head * labelled


def best_seconds(run: Callable[[], Any], tries: int, device: torch.device) -> float:
    """The shortest of several runs."""
    best = float("inf")
    for _ in range(tries):
        synchronize(device)
        begun = time.perf_counter()
        run()
        synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return best


def synchronize(device: torch.device) -> None:
    """Wait for a device that works behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gemm_rate(
    rows: int, inner: int, columns: int, device: torch.device | str = "cpu", tries: int = 30,
    dtype: torch.dtype = torch.bfloat16,
) -> float:  # fmt: skip
    """FLOP/s of the product [rows, inner] x [inner, columns] on random data, the best of several."""
    device = torch.device(device)
    one = torch.randn(rows, inner, device=device).to(dtype)
    other = torch.randn(columns, inner, device=device).to(dtype)
    return 2 * rows * inner * columns / best_seconds(lambda: one @ other.T, tries, device)


def read_rate(device: torch.device | str = "cpu", nbytes: int = 2**28, tries: int = 10) -> float:
    """Bytes/s at which the device reads memory: the sum of float32 numbers, the best of several."""
    device = torch.device(device)
    numbers = torch.ones(nbytes // 4, device=device)
    return nbytes / best_seconds(numbers.sum, tries, device)
