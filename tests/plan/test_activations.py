"""The table of what a layer keeps is what autograd keeps, byte for byte."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from gemma_ft.adapters.fused_layers import with_fused_layers
from gemma_ft.families import records
from gemma_ft.families.records import PRESETS
from gemma_ft.kernels import cpp_backend
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.plan.activations import Layer, checkpointed_bytes, saved_bytes
from gemma_ft.plan.run import attention_of
from gemma_ft.plan.shape import shape_of
from gemma_ft.system import environment
from gemma_ft.train.activation_checkpointing import checkpoint_layers

TOKENS, RANK = 97, 4  # a prime that no weight has: what it divides is of tokens
SIZES = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 128}  # fmt: skip
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SOME = ["q_proj", "v_proj", "down_proj"]
FAMILIES = {"gemma2": "gemma-2-2b", "gemma": "gemma-2b", "gemma3_text": "gemma-3-270m", "vaultgemma": "vaultgemma-1b"}
# what a config has beside SIZES: the layer that is looked at has a window, where there are windows
WINDOWS: dict[str, dict[str, Any]] = {
    "gemma": {},
    "gemma2": {"sliding_window": 64},
    "gemma3_text": {"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "vaultgemma": {"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
}


@pytest.fixture(params=[True, False], ids=["fast", "plain"], autouse=True)
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With the fused layers and the operations in C++, and with PEFT's layers and plain torch."""
    if request.param and not cpp_backend.operations().functions:
        pytest.skip(cpp_backend.operations().reason)
    if not request.param:
        monkeypatch.setenv("GEMMA_FT_KERNELS", "off")
        monkeypatch.setattr(cpp_backend, "operations", lambda: cpp_backend.Operations({}, "none"))
    return bool(request.param)


def model_of(family: str, targets: list[str], dtype: torch.dtype, attention: str | None, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    config = PRESETS[FAMILIES[family]].config(**SIZES, **WINDOWS[family])
    config._attn_implementation = attention
    model = GemmaForCausalLM(config).to(dtype).train()
    if targets:
        options = LoraConfig(r=RANK, target_modules=targets, task_type="CAUSAL_LM", lora_dropout=dropout)
        model = get_peft_model(model, with_fused_layers(options)).train()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model


def kept_for_each_token(model: Any, index: int, narrow: bool) -> float:
    """Bytes that backward keeps of one layer for each token: tensors that are no weights, and not shared with others
    (angles, places).
    """
    native = model.get_base_model() if hasattr(model, "get_base_model") else model
    layer = native.model.layers[index]
    weights = {one.untyped_storage().data_ptr() for one in model.parameters()}
    inside, found = [False], {}

    def pack(tensor: Tensor) -> Tensor:
        if inside[0] and tensor.numel() >= TOKENS and tensor.untyped_storage().data_ptr() not in weights | shared:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def begin(module: Any, arguments: Any) -> None:
        angles, visible = arguments[1], arguments[2]
        shared.update(one.untyped_storage().data_ptr() for one in (*angles, visible.low) if one is not None)
        inside[0] = True

    def end(*_: Any) -> None:
        inside[0] = False

    shared: set[int] = set()
    hooks = [layer.register_forward_pre_hook(begin), layer.register_forward_hook(end)]
    ids = torch.arange(TOKENS)[None]
    cast = torch.autocast("cpu", dtype=torch.bfloat16) if narrow else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), cast:
        model(input_ids=ids, labels=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    rows = [one for one in found.values() if one.numel() % TOKENS == 0]
    return sum(one.untyped_storage().nbytes() for one in rows) / TOKENS


def layer_of(model: Any, family: str, targets: list[str], element: int, dropout: float = 0.0) -> Layer:
    shape = shape_of(family, {"model_type": family, "max_position_embeddings": 256, **SIZES, **WINDOWS[family]})
    native = model.get_base_model() if targets else model
    kind = attention_of(native.config._attn_implementation, softcap=shape.attn_softcap, device="cpu")
    fast = environment.own_kernels_wanted()
    fused = fast and bool(targets) and not dropout
    layer = Layer(shape, TOKENS, element, kind, RANK if targets else 0, frozenset(targets), bool(dropout))
    return replace(layer, fused=fused, own_kernels=fast)


@pytest.mark.parametrize("attention", [None, "sdpa", "blockwise", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("targets", "precision"),
    [(LINEARS, "bf16"), (LINEARS, "float32"), (SOME, "bf16"), ([], "bf16"), ([], "float32")],
    ids=["lora", "lora-float32", "some", "full", "full-float32"],
)
def test_a_layer_keeps_what_the_table_says(
    targets: list[str], precision: str, family: str, attention: str | None
) -> None:
    if attention == "sdpa" and records.FAMILIES[family].attn_softcap:
        return  # refused: it would drop the cap
    narrow = precision == "bf16"
    dtype = torch.bfloat16 if narrow and targets else torch.float32
    model = model_of(family, targets, dtype, attention)
    layer = layer_of(model, family, targets, 2 if narrow else 4)
    assert kept_for_each_token(model, 1, narrow and not targets) == saved_bytes(layer)


def test_dropout_keeps_its_masks_and_inputs() -> None:
    model = model_of("gemma2", LINEARS, torch.bfloat16, None, dropout=0.1)
    assert kept_for_each_token(model, 1, narrow=False) == saved_bytes(layer_of(model, "gemma2", LINEARS, 2, 0.1))


def test_a_checkpointed_layer_keeps_its_input() -> None:
    model = model_of("gemma2", LINEARS, torch.bfloat16, None)
    checkpoint_layers(model, 2)
    assert kept_for_each_token(model, 1, narrow=False) == checkpointed_bytes(layer_of(model, "gemma2", LINEARS, 2))
    assert kept_for_each_token(model, 2, narrow=False) == saved_bytes(layer_of(model, "gemma2", LINEARS, 2))
