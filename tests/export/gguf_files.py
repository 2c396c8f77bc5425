"""GGUF files written from folders, and what a reader finds in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma_ft.build.place import place_of
from gemma_ft.data.encode.tokenizer import load_tokenizer
from gemma_ft.data.encode.tokenizer_files import save_tokenizer
from gemma_ft.export.form_names import GgufType
from gemma_ft.export.gguf_file import plan_gguf, write_gguf
from gemma_ft.export.gguf_tokenizer import read_vocabulary, token_count
from gemma_ft.export.merge.merged import MergedWeights
from gemma_ft.families.records import PRESETS
from gemma_ft.model.gemma import GemmaForCausalLM
from tests.export.tuned import TINY
from tests.parity.amplified import amplify

gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
# Seven layers: one of them, the last but one, sees all keys, as llama.cpp has it. Widths are multiples of 32.
SMALL = {"num_hidden_layers": 7, "hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 4, "head_dim": 32,
         "query_pre_attn_scalar": 32, "sliding_window": 16, "max_position_embeddings": 2048,
         "vocab_size": 2048}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "gemma-3-270m": {"num_key_value_heads": 1},
    "gemma-3-1b": {"num_key_value_heads": 1, "num_hidden_layers": 8},  # the last two have a window
    "gemma-3-4b": {"num_key_value_heads": 2, "vocab_size": 2112},  # a padded table
    "gemma-3-12b": {"num_key_value_heads": 2, "num_hidden_layers": 12, "vocab_size": 2112},  # the last sees all keys
    "gemma-3-27b": {"num_key_value_heads": 2, "num_hidden_layers": 62, "hidden_size": 96, "query_pre_attn_scalar": 24,
                    "vocab_size": 2112},  # D / N is not H
}  # fmt: skip


def save_gemma_3(folder: Path, size: str, *, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """A tiny amplified Gemma 3 in the proportions of a size, with the tiny tokenizer."""
    model = GemmaForCausalLM(PRESETS[size].config(**{**SMALL, **SIZES[size], **fields}))
    amplify(model)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.2)  # else the layers add little to it, and a token follows itself
    model.to(dtype).save_pretrained(str(folder))
    save_tokenizer(load_tokenizer(TINY), folder, system_policy="fold")
    return folder


def write(folder: Path, out: Path, kind: GgufType = "f32", **options: Any) -> Any:
    """The reader of a file written from a folder."""
    weights, tokenizer = MergedWeights(place_of(folder), []), load_tokenizer(str(folder))
    plan = plan_gguf(weights, kind, tokens=token_count(tokenizer))
    vocabulary = read_vocabulary(tokenizer, rows=plan.config.vocab_size)
    write_gguf(plan, weights, tokenizer, vocabulary, out, **{"name": "x", **options})
    return gguf.GGUFReader(str(out))


def values(reader: Any) -> dict[str, Any]:
    """Every metadata value of a file."""
    found = {name: field.contents() for name, field in reader.fields.items()}
    return {name: value for name, value in found.items() if not name.startswith("GGUF.")}


def stored(reader: Any, name: str) -> np.ndarray:
    """One tensor of a file in float32."""
    tensor = next(tensor for tensor in reader.tensors if tensor.name == name)
    shape = tuple(int(n) for n in reversed(tensor.shape))
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
