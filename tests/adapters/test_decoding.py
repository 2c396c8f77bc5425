"""A model with adapters, in 4 bits or not, decodes through all layers at once as it does one after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from gemma_ft.adapters.fused_layers import with_fused_layers
from gemma_ft.adapters.nf4_linear import UnpackedLinear4bit
from gemma_ft.build.pretrained import load_model
from gemma_ft.families.records import PRESETS
from gemma_ft.kernels import cpp_backend
from gemma_ft.model import gemma
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.model.kv_cache import KVCache

pytestmark = pytest.mark.skipif(not cpp_backend.operations().functions, reason=cpp_backend.operations().reason)
SHAPE = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 96, "sliding_window": 8}  # fmt: skip
GEMMAS: dict[str, dict[str, Any]] = {
    "gemma-2-2b": {},
    "gemma-3-270m": {"num_key_value_heads": 1, "layer_types": ["full_attention", "sliding_attention"]},
}
Change = Callable[[PeftModel], object]


@pytest.fixture(scope="module", params=GEMMAS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Gemma whose weights are large."""
    torch.manual_seed(0)
    model = GemmaForCausalLM(PRESETS[request.param].config(**SHAPE | GEMMAS[request.param]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0, 0.3 if "norm" in name else 2 / weight.shape[-1] ** 0.5)
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(str(folder))
    return folder


def adapted(base: Path, quantize: str | None, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    model = load_model(base, quantize=quantize, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=10, target_modules="all-linear", **options)
    found = get_peft_model(model, with_fused_layers(config)).eval()
    found.add_adapter("other", config)
    found.set_adapter("default")
    with torch.no_grad():
        for name, weight in found.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.2)
    return found


@torch.no_grad()
def states(model: PeftModel, changes: list[Change]) -> Tensor:
    """Final hidden states [passes, B, D] of passes that begin with a change each."""
    native_gemma: Any = model.get_base_model()
    cache = KVCache(native_gemma.model.numerics.window_tokens, slots=3, max_seq_len=32)
    found = []
    for number, change in enumerate((lambda _: None, *changes)):  # past the window, whose rings wrap
        change(model)
        one = cache.open(0, [1] * 3, torch.device("cpu"))
        ids = torch.tensor([[5 + number], [50 + number], [80 + number]])
        found.append(native_gemma.model(ids, past_key_values=one).last_hidden_state[:, 0])
        one.finish()
    return torch.stack(found)


def up(model: PeftModel) -> Any:
    found: Any = model.get_base_model()
    return found.model.layers[1].mlp.up_proj


def move(model: PeftModel) -> None:
    weight = up(model).lora_B["default"].weight
    weight.data = weight.data * -2


SERVED: list[Change] = [
    lambda model: up(model).lora_A["default"].weight.mul_(3),
    move,
    lambda model: model.set_adapter("other"),
    lambda model: model.base_model.disable_adapter_layers(),
    lambda model: model.base_model.enable_adapter_layers(),
    lambda model: up(model).set_scale("other", 3.0),
]
ASIDE: list[Change] = [
    lambda model: model.base_model.set_adapter(["default", "other"]),
    lambda model: up(model).lora_A["default"].register_forward_hook(lambda *_: None),
]


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_it_is_one_layer_after_the_other(base: Path, quantize: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, passed = gemma.decoded, []

    def noted(*arguments: Any) -> Tensor | None:
        passed.append(decoded(*arguments))
        return passed[-1]

    monkeypatch.setattr(gemma, "decoded", noted)
    changes = [*SERVED, *ASIDE]
    found = states(adapted(base, quantize), changes)
    assert [one is not None for one in passed] == [True] * (1 + len(SERVED)) + [False] * len(ASIDE)
    monkeypatch.setattr(gemma, "decoded", lambda *_: None)
    expected = states(adapted(base, quantize), changes)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5
    assert len({round(float(one.norm()), 4) for one in expected}) == len(expected)


def test_dora_is_left_to_peft(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = gemma.decoded
    monkeypatch.setattr(gemma, "decoded", lambda *arguments: passed.append(decoded(*arguments)))
    passed: list[Tensor | None] = []
    states(adapted(base, None, use_dora=True), [])
    assert passed == [None]


def test_4_bits_alone_are_served(base: Path) -> None:
    model = load_model(base, quantize="nf4", dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    assert type(layer) is UnpackedLinear4bit
    assert layer.linear_parts() is not None
    layer.compute_dtype = torch.float32
    assert layer.linear_parts() is None
