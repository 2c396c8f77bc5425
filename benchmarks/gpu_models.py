"""Models for the parts of benchmarks/gpu.py, from a config alone: the same random weights and LoRA start for every
implementation, for they are drawn by name.
"""

from __future__ import annotations

import contextlib
import copy
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

RANK = 16
TINY = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16, "vocab_size": 199}  # fmt: skip


def config_of(name: str, *, dry: bool) -> Any:
    """A published size; of a dry run a tiny one of its family."""
    from gemma_ft.families.records import PRESETS

    preset = PRESETS[name]
    tiny = {key: value for key, value in TINY.items() if key != "sliding_window" or preset.model_type == "gemma2"}
    return preset.config(**tiny) if dry else preset.config()


@contextlib.contextmanager
def made_on(device: torch.device) -> Iterator[None]:
    """New parameters lie on `device`, in bf16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def base(config: Any, *, native: bool, device: torch.device, attention: str | None, quantize: bool) -> Any:
    """Our model or transformers', with weights at the scale of trained ones, its linear layers in NF4 where asked."""
    if native:
        from gemma_ft.model.gemma import GemmaForCausalLM as Chosen
    elif config.model_type == "gemma2":
        from transformers import Gemma2ForCausalLM as Chosen
    else:
        from transformers import GemmaForCausalLM as Chosen
    config = copy.deepcopy(config)  # a model writes its attention into it
    if attention is not None:
        config._attn_implementation = attention
    with made_on(device):
        model = Chosen(config)
    fill(model)
    if not quantize:
        return model
    model = in_nf4(model)
    if native:
        from gemma_ft.adapters.nf4_linear import keep_unpacked

        keep_unpacked(model)  # as a load does
    return model


@torch.no_grad()
def fill(model: nn.Module, only: str = "") -> None:
    """Random values for parameters whose name contains `only`: those of a name are the same in every model."""
    for name, weight in model.named_parameters():
        if only in name:
            short = name.removeprefix("base_model.model.")
            draw = torch.Generator(device=weight.device).manual_seed(zlib.crc32(short.encode()))
            scale = 0.3 if "norm" in name else 0.02 if "lora_B" in name else weight.shape[-1] ** -0.5
            weight.normal_(0, scale, generator=draw)


def in_nf4(model: Any) -> Any:
    """Every linear layer but the head as a 4-bit one, made from its weight."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear or name == "lm_head":
                continue
            stored: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4", "quant_storage": torch.bfloat16}
            packed = Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16,
                                device="meta", **stored)  # fmt: skip
            packed.weight = Params4bit(layer.weight.data, requires_grad=False, **stored).to(layer.weight.device)
            packed.support_avx512bf16_for_cpu = False  # a packed weight gives no gradient
            setattr(parent, name, packed)
    model.is_loaded_in_4bit = True  # PEFT asks
    return model


def with_lora(model: Any, *, fused: bool) -> Any:
    """LoRA on all linear layers, as if trained for a while; `fused`: by the layers that a run of ours has."""
    from peft import LoraConfig, get_peft_model

    for weight in model.parameters():
        weight.requires_grad_(False)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    if fused:
        from gemma_ft.adapters.fused_layers import with_fused_layers

        config = with_fused_layers(config)
    wrapped = get_peft_model(model, config)
    fill(wrapped, "lora_")
    return wrapped


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all weights, tied ones once."""
    return sum(weight.nbytes for weight in {id(one): one for one in model.parameters()}.values())


def batches(
    config: Any, *, tokens: int, rows: int, packed: bool, steps: int, device: torch.device
) -> list[dict[str, Tensor]]:
    """Pre-tokenized batches, the same for every arm. `packed`: full rows of three documents, told by positions that
    restart; else rows of unequal length, padded to the longest. Half of the tokens are labelled.
    """  # fmt: skip
    draw = torch.Generator().manual_seed(1)
    found = []
    for _ in range(steps):
        ids = torch.randint(4, config.vocab_size, (rows, tokens), generator=draw)
        labels = ids.where(torch.rand(rows, tokens, generator=draw) < 0.5, -100)
        batch = {"input_ids": ids}
        if packed:
            positions = torch.cat([torch.arange(one) for one in document_lengths(tokens)]).expand(rows, -1)
            labels[positions == 0] = -100
            batch["position_ids"] = positions.contiguous()
        else:
            sizes = (tokens * (0.15 + 0.85 * torch.rand(rows, generator=draw))).long()
            sizes[0] = tokens
            real = torch.arange(tokens)[None] < sizes[:, None]
            batch |= {"input_ids": ids * real, "attention_mask": real.long()}
            labels[~real] = -100
        found.append({name: one.to(device) for name, one in (batch | {"labels": labels}).items()})
    return found


def document_lengths(tokens: int) -> list[int]:
    """Half, a third, and the rest of a row."""
    return [tokens // 2, tokens // 3, tokens - tokens // 2 - tokens // 3]
