"""Parts of benchmarks/gpu.py: matrix products, attention and the head by themselves, in bf16 on Gemma's shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_setup import Setup
from benchmarks.shared.limits import best_seconds, gemm_rate, keys_seen
from gemma_ft.kernels.flex_attention import TILES, block_mask, flex_attention

CAP = 50.0
HEADS = {"gemma-2-2b": (8, 4, 256), "gemma-2-27b": (32, 16, 128)}  # query heads, key/value heads, head dim


def gemm(setup: Setup) -> dict[str, Any]:
    """TFLOP/s of the products of one layer and of the head, over 8192 tokens."""
    from gemma_ft.families.records import PRESETS

    found = {}
    for name in setup.models:
        config = PRESETS[name].config()
        tokens, d, f = (
            setup.small(8192, 16),
            setup.small(config.hidden_size, 32),
            setup.small(config.intermediate_size, 64),
        )
        shapes = {
            "up": (tokens, d, f),
            "down": (tokens, f, d),
            "head": (setup.small(1024, 16), d, setup.small(256_000, 99)),
        }
        found[name] = {
            what: {"shape": shape, "tflops": gemm_rate(*shape, device=setup.device, tries=setup.tries) / 1e12}
            for what, shape in shapes.items()
        }
    return found


def attention(setup: Setup) -> dict[str, Any]:
    """Milliseconds and TFLOP/s of forward, and of forward and backward, with the cap and a window or without."""
    found: dict[str, Any] = {}
    for name, (heads, kv, width) in HEADS.items():
        for tokens in (4096, 8192):
            for window in (None, 4096):
                size, seen = setup.small(tokens, 24), None if window is None else setup.small(window, 8)
                shape = (setup.small(heads, 2), setup.small(kv, 1), setup.small(width, 16))
                line = _attention_line(setup, shape, size, seen)
                found[f"{name} head dim {width}, {tokens} tokens, window {window}"] = line
    return found


def _attention_line(setup: Setup, shape: tuple[int, int, int], tokens: int, window: int | None) -> dict[str, Any]:
    from gemma_ft.model.attention import BACKENDS, AttentionMask, first_visible, visible_keys

    heads, kv, width = shape
    index = torch.arange(tokens, device=setup.device)
    low = first_visible(tokens, window_tokens=window, device=setup.device)
    assert low is not None
    visible = AttentionMask(lambda: visible_keys(index, index, window_tokens=window), lambda: low)
    draw = torch.Generator(device=setup.device).manual_seed(0)
    query, key, value = (
        torch.randn(1, n, tokens, width, generator=draw, device=setup.device, dtype=torch.bfloat16, requires_grad=True)
        for n in (heads, kv, kv)
    )
    options = {"scale": width**-0.5, "softcap": CAP}
    arms: dict[str, Callable[[], Tensor]] = {
        name: (lambda attend=attend: attend(query, key, value, visible, **options)) for name, attend in BACKENDS.items()
    }
    blocks = block_mask(low)
    for name, tiles in FLEX.items():
        arms[name] = partial(flex_attention, query, key, value, blocks, tiles=tiles, **options)
    flops = 4 * heads * width * keys_seen([tokens], window) * tokens
    reference = arms["eager"]().detach().float()

    def measured(run: Callable[[], Tensor]) -> dict[str, Any]:
        def both() -> None:
            torch.autograd.grad(run().sum(), (query, key, value))

        with torch.no_grad():
            distance = float((run().float() - reference).norm() / reference.norm())
            forward = best_seconds(run, setup.tries, setup.device)
        whole = best_seconds(both, setup.tries, setup.device)
        return {"forward_ms": forward * 1e3, "forward_tflops": flops / forward / 1e12, "both_ms": whole * 1e3,
                "both_tflops": 3.5 * flops / whole / 1e12, "from_eager": distance}  # fmt: skip

    return {name: setup.attempt(lambda run=run: measured(run)) for name, run in arms.items()}


# FlexAttention as it runs by itself, and with what may be faster: the assembler says that at a head dim of 256 torch's
# own tiles spill registers backwards, and half as much with eight warps
FLEX: dict[str, dict[str, int]] = {
    "flex": TILES[0],
    "flex, 8 warps backwards": {"bwd_num_warps": 8},
    "flex, smaller tiles": TILES[1],
}


def head(setup: Setup) -> dict[str, Any]:
    """Milliseconds and peak memory of the loss and its gradient of the hidden states, the head frozen."""
    found: dict[str, Any] = {}
    for name in setup.models:
        from gemma_ft.families.records import PRESETS

        width, vocabulary = setup.small(PRESETS[name].config().hidden_size, 32), setup.small(256_000, 99)
        for rows in (2048, 8192):
            tokens = setup.small(rows, 16)
            draw = torch.Generator(device=setup.device).manual_seed(0)
            options = {"generator": draw, "device": setup.device, "dtype": torch.bfloat16}
            hidden = torch.randn(1, tokens, width, **options).requires_grad_()
            weight = torch.randn(vocabulary, width, **options) / width**0.5
            labels = torch.randint(vocabulary, (1, tokens), generator=draw, device=setup.device)
            found[f"{name}, {rows} rows"] = {
                arm: setup.attempt(lambda loss=loss, hidden=hidden, weight=weight, labels=labels:
                                   _head_line(setup, loss, hidden, weight, labels))
                for arm, loss in LOSSES.items()
            }  # fmt: skip
    return found


def _head_line(setup: Setup, loss: Callable[..., Tensor], *given: Tensor) -> dict[str, Any]:
    hidden, weight, labels = given

    def both() -> float:
        value = loss(hidden, weight, labels)
        torch.autograd.grad(value, hidden)
        return float(value.detach())

    value, before = both(), setup.reset_peak()
    both()
    peak = setup.peak() - before
    seconds = best_seconds(both, setup.tries, setup.device)
    flops = 4 * weight.numel() * (labels.shape[1] - 1)
    return {"ms": seconds * 1e3, "tflops": flops / seconds / 1e12, "peak_mib": peak / 2**20, "loss": value}


def _ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from gemma_ft.model.lm_head import fused_head_loss

    found = fused_head_loss(hidden, weight, labels, softcap=30.0)
    return found.loss_sum / found.token_count


def _plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = 30.0 * torch.tanh((hidden[0, :-1] @ weight.T).float() / 30.0)
    return F.cross_entropy(logits, labels[0, 1:])


def _transformers(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As Gemma2ForCausalLM does it: the cap in bf16, then the loss in float32."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits = torch.tanh((hidden @ weight.T) / 30.0) * 30.0
    return ForCausalLMLoss(logits, labels, vocab_size=len(weight))


LOSSES = {"ours": _ours, "plain": _plain, "transformers": _transformers}
