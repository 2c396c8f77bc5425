"""Folders that hold a vision tower beside their text model, as stock transformers writes them: 4B's shape, tiny."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, GenerationConfig

from gemma_ft.data.encode.tokenizer import load_tokenizer
from gemma_ft.data.encode.tokenizer_files import save_tokenizer
from gemma_ft.families.records import PRESETS
from tests.parity.amplified import amplify

ROOT = Path(__file__).resolve().parents[1]
TINY = str(ROOT / "data" / "gemma-tiny")
LAYERS = 7  # a whole period of five sliding layers and a full one, and the next
IMAGE_TOKEN, TOKENS_OF_AN_IMAGE = 4, 4


def multimodal_config(vocab_size: int) -> Gemma3Config:
    """The config of 4B with all its widths divided by 32 and a window of 8, and a SigLIP of two layers."""
    text = PRESETS["gemma-3-4b"].config(
        vocab_size=vocab_size, hidden_size=80, intermediate_size=96, num_hidden_layers=LAYERS, head_dim=16,
        query_pre_attn_scalar=16, sliding_window=8, max_position_embeddings=2048,
    )  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 7}  # fmt: skip
    return Gemma3Config(
        text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=TOKENS_OF_AN_IMAGE,
        image_token_index=IMAGE_TOKEN, boi_token_index=5, eoi_token_index=6, eos_token_id=[1, 7],
    )  # fmt: skip


def save_multimodal(folder: Path, *, dtype: torch.dtype = torch.float32, shard: str = "50GB", seed: int = 0) -> Path:
    """A folder with loud random weights, the tiny tokenizer and its vocabulary, and what a processor reads."""
    tokenizer = load_tokenizer(TINY)
    model = Gemma3ForConditionalGeneration(multimodal_config(len(tokenizer)))
    amplify(model, seed)
    ids = {"bos_token_id": 2, "eos_token_id": [1, 7], "pad_token_id": 0}
    model.generation_config = GenerationConfig(**ids, do_sample=True, top_k=64)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    save_tokenizer(tokenizer, folder, system_policy="fold")
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}\n')
    return folder


def rewrite(folder: Path, change: Any) -> None:
    """Give a folder of one file other tensors: `change` makes them of those that it has."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def reference(folder: Path, dtype: torch.dtype = torch.float32) -> Gemma3ForConditionalGeneration:
    """The whole model by stock transformers, in eval mode."""
    return Gemma3ForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()


def image_inputs(ids: Tensor) -> dict[str, Tensor]:
    """A row of text ids [1, T] with an image before it."""
    mark, text = torch.full((1, TOKENS_OF_AN_IMAGE), IMAGE_TOKEN), torch.zeros_like(ids)
    pixels = torch.randn((1, 3, 28, 28), generator=torch.Generator().manual_seed(1))
    return {
        "input_ids": torch.cat((ids[:, :1], mark, ids[:, 1:]), dim=1),
        "token_type_ids": torch.cat((text[:, :1], torch.ones_like(mark), text[:, 1:]), dim=1),
        "pixel_values": pixels,
    }


def index_of(folder: Path) -> dict[str, str]:
    """Tensor -> shard."""
    found: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return found
