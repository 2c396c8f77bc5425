"""Reward models to ask: an adapter with its head, as training leaves it, and every weight of it away from its start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gemma_ft.adapters.lora import add_adapter, save_adapter
from gemma_ft.build.contract import contract_of
from gemma_ft.build.located import Source
from gemma_ft.build.pretrained import load_base
from gemma_ft.build.text_weights import model_weights
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.tokenizer import load_tokenizer
from gemma_ft.data.encode.tokenizer_files import save_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "data" / "gemma-tiny"
SCORE = "base_model.model.score.weight"
SETTINGS: dict[str, Any] = {
    "rank": 4, "alpha": 8, "dropout": 0.0, "targets": "all-linear", "rslora": False, "dora": False, "init": "default",
    "revision": None,
}  # fmt: skip


def stirred(model: Any) -> Any:
    """Every weight that is trained, moved away from where it began."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    return model


def save_reward_adapter(folder: Path, base: Path = TINY, *, quantize: Any = None, **facts: Any) -> Path:
    """An adapter folder as training leaves it."""
    model = load_base(Source(str(base), None), dtype=torch.float32, quantize=quantize, reward=True)
    wrapped = stirred(add_adapter(model, base=str(base), reward=True, **SETTINGS))
    folder.mkdir(parents=True)
    save_adapter(wrapped, folder)
    tokenizer = load_tokenizer(str(TINY))
    save_tokenizer(tokenizer, folder, system_policy="fold")
    facts = {"precision": "float32", **facts, "base": str(base), "quantize": quantize}
    contract_of(ChatEncoder(tokenizer), base_sha256=model_weights(base).fingerprint(), **facts).write(folder)
    return folder
