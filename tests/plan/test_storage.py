"""Bytes of weights, keys and values are those of the real things."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import bitsandbytes as bnb
import pytest
import torch

from gemma_ft.build.located import Source
from gemma_ft.build.pretrained import load_base
from gemma_ft.families.records import PRESETS
from gemma_ft.infer import engine
from gemma_ft.infer.generate import generate_answers
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.model.kv_cache import KVCache
from gemma_ft.plan import parts, storage
from gemma_ft.plan.run import Run
from gemma_ft.plan.shape import preset_shape, shape_of
from gemma_ft.plan.storage import cache_bytes, linear_bytes, weight_bytes
from gemma_ft.recipe.schema import Train
from gemma_ft.train.optimizers import optimizer_of


def four_bits(weight: Any) -> int:
    """Bytes of a packed weight and of all that it is read with."""
    state = weight.quant_state
    taken = weight.data.nbytes + state.absmax.nbytes + state.code.nbytes
    if state.nested:
        taken += state.state2.absmax.nbytes + state.state2.code.nbytes + state.offset.nbytes
    return int(taken)


def eight_bits(weight: Any) -> int:
    return int(weight.data.nbytes + weight.SCB.nbytes)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("size", [(512, 256), (96, 64), (40, 30)])
def test_four_bits_take_what_bitsandbytes_takes(size: tuple[int, int], double_quant: bool) -> None:
    packed = bnb.nn.Params4bit(torch.randn(size).bfloat16(), requires_grad=False, quant_type="nf4",
                               compress_statistics=double_quant, quant_storage=torch.bfloat16).to("cpu")  # fmt: skip
    assert linear_bytes(*size, "nf4", double_quant=double_quant) == four_bits(packed)


def test_eight_bits_take_what_bitsandbytes_takes() -> None:
    eight = bnb.nn.Int8Params(torch.randn(48, 64).bfloat16(), requires_grad=False).to("cpu")
    assert linear_bytes(48, 64, "int8") == eight_bits(eight)


@pytest.mark.parametrize("name", ["gemma-2-2b", "gemma-3-4b", "vaultgemma-1b"])
@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("float32", torch.float32)])
def test_plain_weights_take_their_dtype(kind: storage.Kind, dtype: torch.dtype, name: str) -> None:
    with torch.device("meta"):
        model = GemmaForCausalLM(PRESETS[name].config()).to(dtype)
    assert weight_bytes(preset_shape(name), kind) == sum(one.nbytes for one in model.parameters())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_norms_and_the_table_stay_as_they_are_beside_quantized_layers(
    kind: Literal["nf4", "int8"], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "head_dim": 32, "vocab_size": 300,
             "num_attention_heads": 4, "num_key_value_heads": 1}  # fmt: skip
    config = PRESETS["gemma-3-270m"].config(**sizes, layer_types=None)
    GemmaForCausalLM(config).to(torch.bfloat16).save_pretrained(str(tmp_path))
    model = load_base(Source(str(tmp_path), None), dtype=torch.bfloat16, quantize=kind, trainable=True)
    shape = shape_of("small", {"model_type": "gemma3_text", **sizes})
    layers = [one for one in model.modules() if isinstance(one, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)]
    taken = sum(four_bits(one.weight) if kind == "nf4" else eight_bits(one.weight) for one in layers)
    assert (len(layers), storage.layer_bytes(shape, kind) * shape.layers) == (7 * shape.layers, taken)
    others = [one for name, one in model.named_parameters() if "proj" not in name]
    assert {one.dtype for one in others} == {torch.bfloat16}
    assert weight_bytes(shape, kind) == taken + sum(one.nbytes for one in others)


@pytest.mark.parametrize("name", ["gemma-2-2b", "gemma-7b", "gemma-3-270m", "gemma-3-4b", "vaultgemma-1b"])
@pytest.mark.parametrize("tokens", [512, 1024, 4096, 4608, 8192])
def test_the_cache_takes_what_the_engines_takes(name: str, tokens: int) -> None:
    shape = preset_shape(name)
    if tokens > shape.max_positions:
        return
    cache = KVCache(shape.windows, slots=2, max_seq_len=shape.max_positions)
    piece = torch.empty((2, shape.kv_heads, engine.PREFILL_TOKENS, shape.head_dim), dtype=torch.bfloat16, device="meta")
    for _ in range(tokens // engine.PREFILL_TOKENS):
        one = cache.open(0, [engine.PREFILL_TOKENS] * 2, torch.device("meta"))
        for layer in range(shape.layers):
            one.update(piece, piece, layer)
        one.finish()
    assert cache_bytes(shape, tokens, rows=2) == cache.nbytes()


def test_answers_need_no_more_cache_than_planned() -> None:
    """Places double: a prompt of any length holds at most what is planned, and at least half of it."""
    torch.manual_seed(0)
    model = GemmaForCausalLM(PRESETS["gemma-tiny"].config(vocab_size=300)).eval()
    shape = preset_shape("gemma-tiny")
    held = []
    original = engine.Engine.step

    def step(self: engine.Engine) -> list[engine.Emitted]:
        emitted = original(self)
        held.append(self._cache.nbytes())
        return emitted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Engine, "step", step)
        for tokens in (20, 300, 700):
            held.clear()
            generate_answers(model, [[5] * tokens] * 2, stop_ids=[], max_new_tokens=3, batch_size=2)
            planned = cache_bytes(shape, tokens + 3, rows=2, limit=tokens + 3, element=4)
            assert planned / 2 <= max(held) <= planned


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "lion8bit"])
@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_moments_take_what_an_optimizer_keeps(strategy: Literal["full", "lora"], optimizer: Any) -> None:
    run = Run(shape=preset_shape("gemma-tiny"), strategy=strategy, micro_batch_size=1, tokens=64, rank=16,
              optimizer=optimizer)  # fmt: skip
    train = Train(optimizer=optimizer)
    sizes = [size for size, count in run.trained_tensors.items() for _ in range(count)]
    assert sum(sizes) == run.trained
    weights = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    for one in weights:
        one.grad = torch.ones_like(one)
    made = optimizer_of(train)
    stepper = torch.optim.AdamW(weights) if made is None else made[0](weights, **made[1])
    stepper.step()
    kept = [one for state in stepper.state.values() for name, one in state.items() if name != "step"]
    assert sum(one.numel() * one.element_size() for one in kept) == parts.optimizer(run)
