"""Frozen weights in 4 or 8 bits, through bitsandbytes, on CUDA and CPU."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from gemma_ft.system import environment

Kind = Literal["nf4", "int8"]
PACKED_ROWS = 32  # output features that bitsandbytes' packed CPU kernel takes at a time


def quantization_config(kind: Kind, *, double_quant: bool, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """What `from_pretrained(quantization_config=...)` needs to store every linear layer but the head as `kind`.

    nf4 (arXiv:2305.14314) computes in `compute_dtype` and stores bytes in it too, so that FSDP can shard them as
    parameters. int8 (arXiv:2208.07339) multiplies in float16 inside bitsandbytes: the one declared exception to "no
    float16", safe because each row is scaled by its own maximum first. It says so in the log at every product, which is
    kept quiet from here on, whoever loads the model.
    """
    environment.quiet_bitsandbytes()
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=compute_dtype,
    )


def make_empty(layer: Any) -> None:
    """Give a 4-bit layer that was made without memory a weight of the shape in which it will be stored, and no values:
    one number stands for all of them.
    """
    from bitsandbytes.nn import Params4bit

    old = layer.weight
    storage = layer.quant_storage
    one = torch.zeros((), dtype=storage).expand(layer.in_features * layer.out_features // (2 * storage.itemsize), 1)
    layer.weight = Params4bit(
        one,
        requires_grad=False,
        blocksize=old.blocksize,
        quant_type=old.quant_type,
        compress_statistics=old.compress_statistics,
        quant_storage=storage,
        bnb_quantized=True,
    )
    layer.weight_options = {
        "blocksize": old.blocksize,
        "quant_type": old.quant_type,
        "compress_statistics": old.compress_statistics,
        "quant_storage": storage,
    }


def quantized(layer: Any, weight: Tensor, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """The packed weight [numel / 2 bytes, 1] of the empty layer, made on `device` as a load would make it, and the
    tensors that it is read with.
    """
    from bitsandbytes.nn import Params4bit

    packed = Params4bit(weight.to(layer.compute_dtype), requires_grad=False, **layer.weight_options).to(device)
    return packed.data, packed.quant_state.as_dict(packed=True)


def fill_quantized(layer: Any, state: dict[str, Tensor], device: torch.device) -> None:
    """Tell a layer how its packed weight is read; its weight may since have been replaced."""
    from bitsandbytes.functional import QuantState

    layer.quant_state = QuantState.from_dict(dict(state), device=device)


def allow_packing(model: nn.Module) -> int:
    """Let quantized layers of a model that is only asked use bitsandbytes' packed kernel; returns how many may.

    In the first no-grad forward on a CPU with AVX512-BF16 it repacks their weights, rounds the block scales to bf16 and
    computes in bf16. So a layer may do it only when it computes in bf16 anyway, and when its shape is one that the
    kernel takes; others stay as they are. Packed weights must not be read as NF4 afterwards, and refuse a backward.
    """
    from bitsandbytes.functional import has_avx512bf16
    from bitsandbytes.nn import Linear4bit

    from gemma_ft.adapters.nf4_linear import PackedLinear4bit

    allowed = 0
    for name, module in list(model.named_modules()):
        if type(module) is not Linear4bit or module.weight.quant_state is None or not has_avx512bf16():
            continue
        block = module.weight.quant_state.blocksize
        fits = module.out_features % PACKED_ROWS == 0 and block > 0 and module.in_features % block == 0
        if fits and module.compute_dtype == torch.bfloat16 and module.weight.device.type == "cpu":
            model.set_submodule(name, PackedLinear4bit(module))
            allowed += 1
    return allowed
