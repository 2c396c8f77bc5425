"""The log-probabilities of a policy that has not moved are those of its reference, to the bit: the same weights in
training mode, with a gradient and without, the adapter on, off, or a frozen copy of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from gemma_ft.adapters import fused_lora
from gemma_ft.adapters.fused_layers import with_fused_layers
from gemma_ft.adapters.lora import adapter_off, add_adapter
from gemma_ft.build.located import Source
from gemma_ft.build.pretrained import load_base
from gemma_ft.data.pack.collate_preferences import PreferenceCollator
from gemma_ft.families.records import PRESETS
from gemma_ft.kernels import cpp_backend, matmul
from gemma_ft.kernels.gemv import OWN_ROWS
from gemma_ft.model import linear as linear_module
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.model.linear import linear
from gemma_ft.system import environment
from gemma_ft.train.reference import known_to_model
from tests.parity.amplified import amplify

BF16 = torch.bfloat16
STORED = {"float32": (torch.float32, None), "bf16": (BF16, None), "nf4": (BF16, "nf4"), "int8": (BF16, "int8")}
FAMILIES = ("gemma-2b", "gemma-2-2b")  # without a cap and with one
TARGETS = ["q_proj", "v_proj"]
FEW, MANY = (1, OWN_ROWS - 3), (2, 3 * matmul.MANY // 4)  # sequences and tokens: products have kernels of their own


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of each family, amplified, wide enough that the order of a sum shows in bf16."""
    environment.quiet_libraries()
    target = tmp_path_factory.mktemp("bases")
    sizes = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 101}
    for family in FAMILIES:
        more = {"sliding_window": 8, "query_pre_attn_scalar": 64} if family == "gemma-2-2b" else {}
        config = PRESETS[family].config(**sizes, **more, intermediate_size=512, num_hidden_layers=2)
        model = GemmaForCausalLM(config)
        amplify(model)
        model.save_pretrained(str(target / family))
    return target


@pytest.fixture(params=["C++", "float32", "off"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the operations in C++; with products in float32 besides, as on processors that do those faster; with neither
    and PEFT's own layers.
    """
    kind: str = request.param
    if kind == "off":
        monkeypatch.setenv("GEMMA_FT_KERNELS", "off")
        monkeypatch.setattr(cpp_backend, "operations", lambda: cpp_backend.Operations({}, "none"))
    elif not cpp_backend.operations().functions:
        pytest.skip(cpp_backend.operations().reason)
    monkeypatch.setattr(matmul, "widens", lambda: kind == "float32")
    return kind


def adapted(place: Path, stored: str, targets: Any = "all-linear") -> Any:
    dtype, kind = STORED[stored]
    base = load_base(Source(str(place), None), dtype=dtype, quantize=kind, double_quant=True, attention=None)
    options: dict[str, Any] = {"rslora": False, "dora": False, "init": "default", "base": str(place), "revision": None}
    torch.manual_seed(0)
    return add_adapter(base, rank=4, alpha=8, dropout=0.0, targets=targets, **options)


def batch(rows: int, tokens: int, *, packed: bool) -> dict[str, Tensor]:
    ids = torch.randint(4, 101, (rows, tokens), generator=torch.Generator().manual_seed(1))
    documents = torch.arange(tokens) // (tokens // 2 + 1) if packed else torch.zeros(tokens, dtype=torch.int64)
    labels = ids.clone()
    labels[:, : tokens // 3] = -100
    return {"input_ids": ids, "labels": labels, "document_ids": documents.expand(rows, -1)}


def pairs(count: int, prompt: int) -> dict[str, Tensor]:
    """Two answers to each of some prompts, which are computed once."""
    draw, rows = torch.Generator().manual_seed(2), []
    for _ in range(count):
        asked = torch.randint(4, 101, (prompt,), generator=draw).tolist()
        both: dict[str, list[Any]] = {"input_ids": [], "labels": [], "position_ids": [], "document_ids": []}
        for side, size in enumerate((prompt, prompt // 2)):
            said = torch.randint(4, 101, (size,), generator=draw).tolist()
            both["input_ids"] += asked + said
            both["labels"] += [-100] * prompt + said
            both["position_ids"] += range(prompt + size)
            both["document_ids"] += [side] * (prompt + size)
        rows.append({**both, "sides": [1, 0], "row_weights": [1.0], "margins": [0.0]})
    found = known_to_model(PreferenceCollator(0)(rows))
    assert "distinct_places" in found
    return found


def logprobs(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What an objective is given in a pass in training mode."""
    asked: list[Tensor] = []
    loss = model.train()(
        **inputs, use_cache=False, num_items_in_batch=1, loss_weights=lambda given: asked.append(given) or -given
    ).loss
    assert loss.requires_grad == torch.is_grad_enabled()
    if loss.requires_grad:
        loss.backward()
    return asked[0]


def without_gradient(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return logprobs(model, inputs)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_is_its_base(folder: Path, family: str, stored: str, kernels: str) -> None:
    """B = 0: with the adapter switched off, for few tokens and many, packed and not, checkpointed and not."""
    model = adapted(folder / family, stored)
    for size, packed, checkpointed in ((FEW, False, False), (MANY, True, False), (MANY, False, True)):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs = batch(*size, packed=packed)
        found = logprobs(model, inputs)
        with adapter_off(model):
            assert torch.equal(without_gradient(model, inputs), found), (size, packed)
        assert torch.equal(without_gradient(model, inputs), found), (size, packed)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_that_is_computed_once_changes_nothing_of_it(
    folder: Path, family: str, stored: str, kernels: str
) -> None:
    model = adapted(folder / family, stored)
    for inputs in (pairs(1, 4), pairs(2, matmul.MANY // 4)):
        found = logprobs(model, inputs)
        with adapter_off(model):
            assert torch.equal(without_gradient(model, inputs), found)


@pytest.mark.parametrize("stored", STORED)
def test_a_policy_is_the_frozen_copy_of_where_it_starts(folder: Path, stored: str, kernels: str) -> None:
    """Also where most layers have no adapter, and are plain."""
    model = adapted(folder / FAMILIES[1], stored, TARGETS)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    model.add_adapter("reference", with_fused_layers(config))
    own = model.state_dict()
    frozen = {name: one for name, one in model.named_parameters() if ".reference." in name}
    assert len(frozen) == 2 * 2 * len(TARGETS)
    for name, weight in frozen.items():
        weight.requires_grad_(False).data = own[name.replace(".reference.", ".default.")].clone()
    for size, packed in ((FEW, False), (MANY, True)):
        inputs = batch(*size, packed=packed)
        found = logprobs(model, inputs)
        model.set_adapter("reference", inference_mode=True)
        assert torch.equal(without_gradient(model, inputs), found), size
        model.set_adapter("default")
        with adapter_off(model):
            assert not torch.equal(without_gradient(model, inputs), found), "this adapter does something"


def test_the_kernels_of_their_own_are_those_that_differ(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes above show what they are to show: with the choice left to the gradient the bits differ."""
    if not cpp_backend.operations().functions:
        pytest.skip(cpp_backend.operations().reason)
    monkeypatch.setattr(matmul, "widens", lambda: True)
    model = adapted(folder / FAMILIES[1], "bf16")
    monkeypatch.setattr(fused_lora, "frozen_linear", lambda x, weight, _: nn.functional.linear(x, weight))
    for size in (FEW, MANY):
        inputs = batch(*size, packed=False)
        found = logprobs(model, inputs)
        with adapter_off(model):
            assert not torch.equal(without_gradient(model, inputs), found)


def test_a_layer_in_training_mode_computes_as_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(512, 512, bias=False, dtype=BF16).requires_grad_(False)
    taken: list[int] = []
    monkeypatch.setattr(linear_module, "gemv", lambda x, weight: taken.append(len(x)) or x @ weight.T)
    x = torch.randn(3, 512).to(BF16)
    with torch.no_grad():
        assert torch.equal(linear(layer.train(), x), layer(x))
        assert taken == []
        linear(layer.eval(), x)
    assert taken == [3]


def test_switched_off_it_still_passes_a_gradient(folder: Path) -> None:
    for stored in ("bf16", "nf4"):
        layer = adapted(folder / FAMILIES[0], stored).train().base_model.model.model.layers[0].mlp.gate_proj
        x = torch.randn(2, 5, 512, generator=torch.Generator().manual_seed(0)).to(BF16).requires_grad_()
        (wanted,) = torch.autograd.grad(layer(x).sum(), x)
        layer.enable_adapters(False)
        (found,) = torch.autograd.grad(layer(x).sum(), x)
        assert found.any()
        assert torch.equal(found, wanted), stored
