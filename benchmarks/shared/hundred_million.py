"""The Gemma 2 of 100M parameters that benchmarks on a CPU share: shape, weights, a LoRA start, tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.shared.record import ROOT

SHAPE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 8, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 256, "sliding_window": 256}  # fmt: skip
RANK = 16
VOCABULARY = 32_000


def random_gemma(config: Any, *, seed: int = 0) -> Any:
    """Our model of a config in bf16, with random weights at the scale of trained ones: zeros run faster than data."""
    from gemma_ft.model.gemma import GemmaForCausalLM

    torch.manual_seed(seed)
    model = GemmaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0, 0.3 if "norm" in name else 1.0 / weight.shape[-1] ** 0.5)
    return model.to(torch.bfloat16)


def gemma(vocabulary: int = VOCABULARY) -> Any:
    """The config."""
    from gemma_ft.families.records import PRESETS

    return PRESETS["gemma-2-2b"].config(vocab_size=vocabulary, **SHAPE)


def write_base(folder: Path, vocabulary: int = VOCABULARY, *, lively: bool = False) -> None:
    """folder/base and a LoRA start on it, folder/adapter, which all arms share.

    `lively`: for answers; a random tied head repeats the last token for ever unless the final norm turns the states
    away from it.
    """
    from peft import LoraConfig, get_peft_model

    model = random_gemma(gemma(vocabulary))
    if lively:
        with torch.no_grad():
            model.model.norm.weight.normal_(-1, 1)  # 1 + w: either sign
    model.save_pretrained(str(folder / "base"))
    wrapped = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    wrapped.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)


def tokenizer() -> Any:
    """One that fits any of these models."""
    from gemma_ft.data.encode.tokenizer import load_tokenizer

    return load_tokenizer(str(ROOT / "data" / "gemma-tiny"))
