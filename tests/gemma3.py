"""A tiny Gemma 3 that lacks nothing of a real one but size: norms of queries and keys, two ropes, windows, and the
tokens of pictures, the last of which has no row in the embedding, as in 270M and 1B.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from gemma_ft.data.encode.tokenizer import load_tokenizer
from gemma_ft.families.family import Preset

TINY = Path(__file__).parents[1] / "data" / "gemma-tiny"
PICTURES = ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
SIZES: dict[str, Any] = {
    "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16,
    "max_position_embeddings": 2048,
}  # fmt: skip


def tiny_gemma3(folder: Path, *, spare_rows: int = -1) -> Path:
    """A folder as transformers writes it. spare_rows: of the embedding, more than there are tokens."""
    tokenizer = load_tokenizer(str(TINY))
    tokenizer.add_special_tokens({"extra_special_tokens": PICTURES})
    torch.manual_seed(7)
    layer_types = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(**SIZES, vocab_size=len(tokenizer) + spare_rows, layer_types=layer_types)
    model = Gemma3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.3 if "norm" in name else 1.5 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(str(folder))
    tokenizer.chat_template = None  # our own
    tokenizer.save_pretrained(str(folder))
    return folder


def preset_of(folder: Path) -> Preset:
    """What a recipe calls its size."""
    return Preset("gemma3_text", str(folder), None, SIZES)
