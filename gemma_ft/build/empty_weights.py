"""A base model with every shape and no values: what ranks build on that will each hold a slice of it only.

Each frozen weight is one number seen at every place, on the CPU: PEFT puts its adapters around it as around a loaded
model, and draws the same initial values. train/fsdp.py cuts it and fills it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import AutoHfQuantizer

from gemma_ft.adapters.quantize import Kind, make_empty, quantization_config
from gemma_ft.build.located import Source
from gemma_ft.build.pretrained import checked_weights
from gemma_ft.build.reward import refuse_reward_base
from gemma_ft.build.text_weights import check_fits
from gemma_ft.build.weights import WeightFiles
from gemma_ft.errors import UserError
from gemma_ft.model.config import read_config, read_generation_config
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.model.linear import keep_trainable
from gemma_ft.model.reward import HEAD_WEIGHT, GemmaForSequenceClassification, RewardHead, check_one_label


def empty_base(
    source: Source,
    *,
    dtype: torch.dtype,
    quantize: Kind | None = None,
    double_quant: bool = True,
    attention: str | None = None,
    reward: bool = False,
) -> Any:
    """The model that `pretrained.load_base` would load, empty: shapes, dtypes and layers are its, values are missing.
    Of a reward model the head has values: it is loaded, or zero.

    Raises: UserError as load_base, for int8, which cannot be cut, and for files that do not hold this model.
    """
    if quantize == "int8":
        raise UserError("quantize.kind: int8 weights cannot be sharded; use nf4, or --launch ddp")
    files = checked_weights(source)
    config = read_config(files.folder)
    config.dtype, config._attn_implementation = dtype, attention
    if reward:
        check_one_label(config, source.name)
    else:
        refuse_reward_base(files.folder, source.name)
    with torch.device("meta"):
        model = (GemmaForSequenceClassification if reward else GemmaForCausalLM)(config).to(dtype)
    check_fits(files, model, source.name)
    if quantize is not None:
        quantizer = AutoHfQuantizer.from_config(
            quantization_config(quantize, double_quant=double_quant, compute_dtype=dtype), pre_quantized=False
        )
        model.hf_quantizer = quantizer
        quantizer.preprocess_model(model, device_map={"": torch.device("cpu")})
        quantizer.postprocess_model(model)
    if reward:
        model.score = _filled_head(model, files)
    for module in model.modules():
        if isinstance(module, RewardHead):
            continue
        if quantize is not None and hasattr(module, "quant_storage"):
            make_empty(module)
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            one = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            module.register_parameter(name, nn.Parameter(one, requires_grad=quantize is None))
    model.tie_weights()
    keep_trainable(model)
    generation = read_generation_config(files.folder)
    if generation is not None and not reward:
        model.generation_config = generation
    model.name_or_path = source.name
    return model


def _filled_head(model: Any, files: WeightFiles) -> RewardHead:
    """The head of a reward model, small enough for every rank to have whole, in float32."""
    head = RewardHead(model.config.hidden_size)
    if HEAD_WEIGHT in files.names:
        with torch.no_grad():
            head.weight.copy_(files.tensor(HEAD_WEIGHT))
    return head


def is_empty(parameter: Tensor) -> bool:
    """Whether a parameter has a shape and no values of its own."""
    return parameter.numel() > 1 and not any(parameter.stride())


def base_name(name: str) -> str:
    """The name that a parameter has in the base's files: without what PEFT puts around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
