"""The weights that an adapter over a quantized base was trained on: quantized and back, as bitsandbytes does it."""

from __future__ import annotations

from dataclasses import dataclass

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from gemma_ft.adapters.quantize import Kind, quantization_config
from gemma_ft.system import hardware


@dataclass(frozen=True)
class Stored:
    """How the frozen weights of a run were kept: the kind, its settings, and the dtype they had when quantized."""

    kind: Kind
    double_quant: bool
    dtype: torch.dtype


def quantize_dequantize(weight: Tensor, stored: Stored) -> Tensor:
    """`weight` quantized and dequantized, bit for bit as the layer of bitsandbytes holds it; on the CPU.

    nf4 gives `stored.dtype` (the layer computes with just this tensor), int8 float32 (the layer also rounds its input,
    which no weight can repeat). Source: transformers integrations/bitsandbytes.py `Bnb4bitQuantize`, `Bnb8bitQuantize`.
    """
    device = hardware.default_device()
    if stored.kind == "int8":
        eight = bnb.nn.Int8Params(weight.to(stored.dtype), requires_grad=False).to(device)
        return bnb.functional.int8_vectorwise_dequant(eight.data, eight.SCB).cpu()
    settings = quantization_config("nf4", double_quant=stored.double_quant, compute_dtype=stored.dtype)
    four = bnb.nn.Params4bit(
        weight.to(stored.dtype),
        requires_grad=False,
        compress_statistics=settings.bnb_4bit_use_double_quant,
        quant_type=settings.bnb_4bit_quant_type,
        quant_storage=settings.bnb_4bit_quant_storage,
    ).to(device)
    return bnb.functional.dequantize_4bit(four.data, four.quant_state).cpu()


def quantized_names(model: nn.Module) -> set[str]:
    """Names of the weights of a Gemma that transformers stores quantized: those of every linear layer but the head.

    Source: transformers quantizers/base.py `get_keys_to_not_convert`.
    """
    return {
        f"{name}.weight" for name, module in model.named_modules() if type(module) is nn.Linear and name != "lm_head"
    }
