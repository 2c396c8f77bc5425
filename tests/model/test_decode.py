"""A pass through all layers at once is the pass through one layer after the other; and when it steps aside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gemma_ft.families.records import PRESETS
from gemma_ft.kernels import cpp_backend
from gemma_ft.kernels.gemv import MOST_ROWS
from gemma_ft.model import gemma
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.model.kv_cache import KVCache

pytestmark = pytest.mark.skipif(not cpp_backend.operations().functions, reason=cpp_backend.operations().reason)
VOCABULARY, WINDOW, PROMPT, STEPS = 96, 12, 9, 20  # the window is passed, and rings wrap
SHAPE = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 8,
         "num_key_value_heads": 1, "head_dim": 32, "vocab_size": VOCABULARY}  # fmt: skip
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMAS: dict[str, dict[str, Any]] = {
    "gemma-2b": {},
    "gemma-2-2b": {"num_key_value_heads": 2, "sliding_window": WINDOW},
    "gemma-3-270m": {"sliding_window": WINDOW, "layer_types": TYPES},
    "gemma-3-4b": {"num_key_value_heads": 2, "sliding_window": WINDOW, "layer_types": TYPES},  # angles of full layers
}
Passed = list[bool]


def model_of(preset: str, dtype: torch.dtype) -> GemmaForCausalLM:
    torch.manual_seed(0)
    model = GemmaForCausalLM(PRESETS[preset].config(**SHAPE | GEMMAS[preset]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0, 0.3 if "norm" in name else 2 / weight.shape[-1] ** 0.5)
    return model.to(dtype).eval()


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> Passed:
    """Of each pass that could go through all layers at once, whether it did."""
    passed: Passed = []
    decoded = gemma.decoded

    def noted(*arguments: Any) -> Tensor | None:
        found = decoded(*arguments)
        passed.append(found is not None)
        return found

    monkeypatch.setattr(gemma, "decoded", noted)
    return passed


@torch.no_grad()
def states(model: Any, lengths: list[int], steps: int = STEPS) -> Tensor:
    """Final hidden states [steps, B, D] of sequences that begin with prompts of these lengths."""
    draw = torch.Generator().manual_seed(1)
    cache = KVCache(model.model.numerics.window_tokens, slots=len(lengths), max_seq_len=PROMPT + STEPS + 4)
    for row, length in enumerate(lengths):
        one = cache.open(row, [length], torch.device("cpu"))
        model.model(torch.randint(4, VOCABULARY, (1, length), generator=draw), past_key_values=one)
        one.finish()
    found = []
    for _ in range(steps):
        one = cache.open(0, [1] * len(lengths), torch.device("cpu"))
        ids = torch.randint(4, VOCABULARY, (len(lengths), 1), generator=draw)
        found.append(model.model(ids, past_key_values=one).last_hidden_state[:, 0])
        one.finish()
    return torch.stack(found)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("lengths", [[PROMPT], [1, 4, PROMPT], [3] * 5 + [PROMPT] * 6], ids=["1", "3", "11"])
@pytest.mark.parametrize("preset", GEMMAS)
def test_it_is_one_layer_after_the_other(
    preset: str, lengths: list[int], at_once: Passed, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        found[dtype] = states(model_of(preset, dtype), lengths)
    assert all(at_once)
    monkeypatch.setattr(gemma, "decoded", lambda *_: None)
    truth = states(model_of(preset, torch.float32), lengths)
    assert distance(found[torch.float32], truth) < 1e-5
    rounded = model_of(preset, torch.bfloat16)
    apart = distance(states(rounded, lengths), exact := states(rounded.float(), lengths))
    assert distance(found[torch.bfloat16], exact) < 1.2 * apart


@pytest.mark.parametrize("preset", ["gemma-2-2b", "gemma-3-270m"])
def test_a_sequence_does_not_depend_on_its_neighbours_or_on_threads(preset: str, at_once: Passed) -> None:
    model, threads = model_of(preset, torch.bfloat16), torch.get_num_threads()
    lengths = [PROMPT] * MOST_ROWS
    many = states(model, lengths, 1)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(states(model, lengths, 1), many)
    finally:
        torch.set_num_threads(threads)
    assert all(at_once)


Change = Callable[[Any], object]
ASIDE: dict[str, Change] = {
    "a hook on a linear layer": lambda model: model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None),
    "a hook on a norm of heads": lambda model: model.model.layers[1].self_attn.k_norm.register_forward_hook(
        lambda *_: None
    ),
    "a hook on a norm": lambda model: model.model.layers[2].input_layernorm.register_forward_pre_hook(lambda *_: None),
    "a hook on a layer": lambda model: model.model.layers[0].register_forward_hook(lambda *_: None),
    "a forward of its own": lambda model: setattr(
        model.model.layers[0].self_attn, "forward", model.model.layers[0].self_attn.forward
    ),
    "a layer in another dtype": lambda model: model.model.layers[1].mlp.up_proj.float(),
    "a bias": lambda model: setattr(model.model.layers[0].mlp.down_proj, "bias", nn.Parameter(torch.zeros(64))),
    "eager": lambda model: model.set_attn_implementation("eager"),
    "float64": lambda model: model.double(),
}


@pytest.mark.parametrize("change", ASIDE.values(), ids=ASIDE)
def test_it_steps_aside(change: Change, at_once: Passed) -> None:
    model = model_of("gemma-3-270m", torch.bfloat16)
    change(model)
    if not any(one.dtype == torch.float32 for one in model.parameters()):
        states(model, [3], 2)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            states(model, [3], 2)
    assert not any(at_once)


def test_it_steps_aside_for_many_and_where_gradients_are_wanted(at_once: Passed) -> None:
    model = model_of("gemma-2-2b", torch.float32)
    states(model, [3] * (MOST_ROWS + 1), 1)
    with torch.enable_grad():
        cache = KVCache(model.model.numerics.window_tokens, slots=1, max_seq_len=8)
        out = model.model(torch.tensor([[5]]), past_key_values=cache.open(0, [1], torch.device("cpu")))
    assert out.last_hidden_state.requires_grad
    assert not any(at_once)


@torch.no_grad()
def test_what_changes_between_passes_is_seen(at_once: Passed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that move, that are changed in place, and that become others."""
    changes: list[Change] = [
        lambda layer: layer.mlp.up_proj.weight.mul_(1.5),
        lambda layer: setattr(layer.mlp.up_proj.weight, "data", layer.mlp.up_proj.weight.data * 0.5),
        lambda layer: setattr(layer.self_attn, "q_proj", nn.Linear(64, 256, bias=False)),
        lambda layer: setattr(layer.input_layernorm, "weight", nn.Parameter(torch.ones(64))),
        lambda layer: setattr(layer.self_attn.q_norm, "weight", nn.Parameter(torch.ones(32))),
        lambda layer: layer.self_attn.k_norm.weight.mul_(2),
    ]

    def run() -> Tensor:
        model = model_of("gemma-3-270m", torch.float32)
        cache = KVCache(model.model.numerics.window_tokens, slots=2, max_seq_len=16)
        found = []
        for change in (None, *changes):
            torch.manual_seed(2)
            if change is not None:
                change(model.model.layers[1])
            one = cache.open(0, [1, 1], torch.device("cpu"))
            found.append(model.model(torch.tensor([[7], [8]]), past_key_values=one).last_hidden_state)
            one.finish()
        return torch.stack(found)

    found = run()
    assert at_once == [True] * 7
    monkeypatch.setattr(gemma, "decoded", lambda *_: None)
    assert distance(found, run()) < 1e-5
