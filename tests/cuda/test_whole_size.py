"""Published sizes in 4 bits on one GPU: they load, answer and learn, within the memory that is promised.

Weights are random, and made layer by layer where they are quantized: nothing holds all of them in bf16. The same code
runs here with every width cut down.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn
from transformers.quantizers import AutoHfQuantizer

from benchmarks.gpu_models import batches
from gemma_ft.adapters.lora import add_adapter
from gemma_ft.adapters.nf4_linear import keep_unpacked
from gemma_ft.adapters.quantize import quantization_config
from gemma_ft.families.records import PRESETS
from gemma_ft.infer.generate import generate_answers
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.model.linear import keep_trainable
from gemma_ft.train.activation_checkpointing import checkpoint_layers
from tests.cuda.conftest import CUDA, DEVICE
from tests.parity.amplified import gradients

GIB = 2**30
CUT = {"num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
       "num_key_value_heads": 2, "vocab_size": 1009, "sliding_window": 48}  # fmt: skip
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    preset: str
    tokens: int  # of the row that is trained on
    loaded_gib: float  # most that loading may take
    trained_gib: float  # most that a step may take

    def config(self, cut: bool) -> Any:
        return PRESETS[self.preset].config(**(CUT if cut else {}), dtype=BF16)


CASES = (Case("gemma-2-27b", 1024, 24, 40), Case("gemma-2-2b", 8192, 6, 16), Case("gemma-2b", 8192, 6, 16))


def room_for(case: Case) -> None:
    """Skips the test where the device has not as much."""
    if not CUDA:
        pytest.skip("there is no CUDA device here")
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / GIB
    if free < case.trained_gib:
        pytest.skip(f"{case.preset} may take {case.trained_gib} GiB, and {free:.0f} GiB are free")


class Held:
    """The most bytes of the device that were in use since it was made, beside what was in use then; 0 on a CPU."""

    def __init__(self) -> None:
        self.before = torch.cuda.memory_allocated() if CUDA else 0
        if CUDA:
            torch.cuda.reset_peak_memory_stats()

    def gib(self) -> float:
        return (torch.cuda.max_memory_allocated() - self.before) / GIB if CUDA else 0.0


@torch.no_grad()
def random_base(config: Any) -> Any:
    """A base in NF4 as load_base gives it, with weights at the scale of trained ones."""
    with torch.device("meta"):
        model = GemmaForCausalLM(config).to(BF16)
    stored = quantization_config("nf4", double_quant=True, compute_dtype=BF16)
    quantizer = AutoHfQuantizer.from_config(stored, pre_quantized=False)
    quantizer.preprocess_model(model, device_map={"": DEVICE})
    draw = torch.Generator(DEVICE).manual_seed(0)

    def drawn(*shape: int, spread: float) -> Tensor:
        return torch.randn(shape, generator=draw, device=DEVICE, dtype=BF16).mul_(spread)

    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            old, shape = module.weight, (module.out_features, module.in_features)
            module.weight = Params4bit(
                drawn(*shape, spread=shape[1] ** -0.5), requires_grad=False, blocksize=old.blocksize,
                compress_statistics=old.compress_statistics, quant_type=old.quant_type, quant_storage=old.quant_storage,
            ).to(DEVICE)  # fmt: skip
        elif name != "lm_head" and isinstance(getattr(module, "weight", None), nn.Parameter):
            size = module.weight.shape
            module.weight = nn.Parameter(drawn(*size, spread=0.3 if len(size) == 1 else size[1] ** -0.5))
    model.tie_weights()
    quantizer.postprocess_model(model)
    keep_unpacked(model)
    keep_trainable(model)
    assert all(one.device.type == DEVICE.type for one in model.parameters())
    return model


def with_adapter(base: Any) -> Any:
    """LoRA on all linear layers, as if trained for a while."""
    model = add_adapter(base, rank=16, alpha=32, dropout=0.0, targets="all-linear", rslora=False, dora=False,
                        init="default", base="random", revision=None)  # fmt: skip
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.02)
    return model


@pytest.mark.parametrize("cut", [True, False], ids=["cut down", "whole"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.preset)
def test_it_loads_answers_and_learns_within_its_memory(case: Case, cut: bool) -> None:
    if not cut:
        room_for(case)
    held, config = Held(), case.config(cut)
    model = with_adapter(random_base(config))
    loaded = held.gib()
    assert loaded < case.loaded_gib

    prompts = [list(range(5, 5 + size)) for size in (40, 7)]
    answers = generate_answers(model, prompts, stop_ids=[], max_new_tokens=6, batch_size=2)
    assert [len(answer.ids) for answer in answers] == [6, 6]
    with torch.no_grad():
        logits = model.eval()(torch.tensor(prompts[:1], device=DEVICE), use_cache=False).logits
    assert logits.isfinite().all()
    assert float(logits.std()) > 0.1, "it says nothing"

    checkpoint_layers(model, config.num_hidden_layers)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    row = batches(config, tokens=150 if cut else case.tokens, rows=1, packed=True, steps=1, device=DEVICE)[0]
    losses: list[float] = []
    for _ in range(2):
        loss = model.train()(**row, use_cache=False).loss
        loss.backward()
        assert all(one.isfinite().all() and one.any() for one in gradients(model).values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0] if cut else losses[1] != losses[0]
    print(f"{case.preset}: loaded within {loaded:.1f} GiB, trained within {held.gib():.1f} GiB, losses {losses}")
    assert held.gib() < case.trained_gib
