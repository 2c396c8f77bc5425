"""Folders to merge: an amplified tiny base with the tiny tokenizer, and adapters on it as training would leave them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from gemma_ft.build.contract import contract_of
from gemma_ft.build.text_weights import model_weights
from gemma_ft.build.weights import WeightFiles
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.tokenizer import load_tokenizer
from gemma_ft.data.encode.tokenizer_files import save_tokenizer
from tests.parity.amplified import ours, tiny_config

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "data" / "gemma-tiny")


def save_base(
    folder: Path, shape: str, *, dtype: torch.dtype = torch.float32, shard: str = "50GB", seed: int = 0
) -> Path:
    """An amplified base of a published shape as a folder, with the tiny tokenizer and its vocabulary."""
    tokenizer = load_tokenizer(TINY)
    model = ours(shape, seed=seed, dtype=dtype, vocab_size=len(tokenizer), num_hidden_layers=2)
    model.save_pretrained(folder, max_shard_size=shard)
    save_tokenizer(tokenizer, folder, system_policy="fold")
    return folder


def wrap(model: Any, **settings: Any) -> PeftModel:
    """`model` with adapters that change it: every weight that PEFT trains is moved away from its start."""
    torch.manual_seed(settings.pop("seed", 0))
    wrapped = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings}))
    with torch.no_grad():
        for name, weight in sorted(wrapped.named_parameters()):
            if weight.requires_grad:
                change = 0.05 * torch.randn(weight.shape)
                weight.mul_(1 + change) if "magnitude" in name else weight.add_(change)
    return wrapped


def save_tuned(
    folder: Path,
    base: Path,
    model: Any,
    *,
    contract: bool = True,
    quantize: Any = None,
    precision: Any = None,
    **settings: Any,
) -> Path:
    """An adapter folder on `base` by stock PEFT; with a contract as our training writes it, or as PEFT leaves it."""
    wrapped = wrap(model, **settings)
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(folder)
    if contract:
        tokenizer = load_tokenizer(TINY)
        save_tokenizer(tokenizer, folder, system_policy="drop")
        facts = {"base": str(base), "base_sha256": model_weights(base).fingerprint(), "quantize": quantize}
        facts["precision"] = precision
        contract_of(ChatEncoder(tokenizer, "drop"), **facts).write(folder)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder."""
    files = WeightFiles.open(folder)
    return {name: files.tensor(name) for name in files.names}


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def names_in(folder: Path) -> list[str]:
    """What lies in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


def linear_names(shape: str) -> set[str]:
    """The weights that all-linear adapts."""
    with torch.device("meta"):
        model = type(ours(shape))(tiny_config(shape, num_hidden_layers=2))
    return {f"{name}.weight" for name, one in model.named_modules() if type(one) is nn.Linear and name != "lm_head"}
