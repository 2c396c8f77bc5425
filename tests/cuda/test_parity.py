"""On the device: our Gemmas against transformers' eager ones and against float64, and the laws of a batch.

Sequences are longer than a block of FlexAttention's masks and no multiple of one, longer than the window, and with a
head dim of 256 as well, which all published sizes but one have.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import pad

from gemma_ft.adapters.fused_layers import with_fused_layers
from gemma_ft.families.records import PRESETS
from gemma_ft.kernels.flex_attention import reason_against
from gemma_ft.kernels.triton.triton_backend import CAPABILITY
from gemma_ft.train.activation_checkpointing import checkpoint_layers
from tests.cuda.conftest import CUDA, DEVICE, kernels, same
from tests.parity.amplified import gradients, masked_labels, ours, reference, relative, token_rows

TOKENS, WINDOW, LAYERS = 150, 40, 2
WIDE = {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
GEMMAS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma 1": ("gemma-2b", {}),
    "gemma 1, head dim 256": ("gemma-7b", WIDE),
    # a query scale that is not the head dim's; 16 is the least that FlexAttention takes
    "gemma 2": ("gemma-2-27b", {"head_dim": 16, "num_attention_heads": 8, "num_key_value_heads": 4}),
    "gemma 2, head dim 256": ("gemma-2-2b", {**WIDE, "query_pre_attn_scalar": 256}),
}
LAWFUL = ("gemma 1", "gemma 2", "gemma 2, head dim 256")
CASES = ("one row", "three rows", "left padding", "right padding", "documents")
LENGTHS = (TOKENS, 131, 17)  # of the rows that are padded
CUTS = ((70, 50, 30), (1, 140, 9), (128, 22))  # documents of each row
NEAR = {"cpu": 2e-5, "cuda": 1e-4}[DEVICE.type]  # of logits; products with TF32, or a fault, are far outside
SLACK = 1.3  # in bf16, of transformers' own distance from the truth
GRADIENTS_NEAR = {"cpu": 1e-4, "cuda": 1e-3}[DEVICE.type]  # loud weights
IGNORED = torch.tensor(-100)
Batch = dict[str, Tensor]


def made(build: Any, name: str, *, fused: bool = True, dropout: float = 0.0, **more: Any) -> Any:
    """A tiny amplified Gemma on the CPU, with loud adapters that are drawn by name."""
    shape, fields = GEMMAS[name]
    window = {"sliding_window": WINDOW} if PRESETS[shape].model_type == "gemma2" else {}
    model = build(shape, num_hidden_layers=LAYERS, **fields, **window, **more)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=dropout)
    wrapped: PeftModel = get_peft_model(model, with_fused_layers(config) if fused else config)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, weight in sorted(wrapped.named_parameters()):
            if "lora_" in key:
                spread = 0.1 if "lora_B" in key else weight.shape[1] ** -0.5
                weight.copy_(torch.randn(weight.shape, generator=draw) * spread)
    return wrapped


def batch(case: str, seed: int = 0) -> Batch:
    """Inputs and labels on the CPU."""
    rows = 1 if case == "one row" else 3
    ids = token_rows(rows, TOKENS, seed)
    places = torch.arange(TOKENS).expand(rows, -1)
    real, positions = torch.ones_like(ids), places
    if "padding" in case:
        sizes = torch.tensor(LENGTHS)[:, None]
        real = (places >= TOKENS - sizes if case == "left padding" else places < sizes).long()
        positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    if case == "documents":
        positions = torch.stack([torch.cat([torch.arange(size) for size in sizes]) for sizes in CUTS])
    labels = masked_labels(ids, seed).where((real > 0) & (positions > 0), IGNORED)
    found = {"input_ids": ids, "labels": labels, "attention_mask": real, "position_ids": positions}
    return found | ({"document_ids": (positions == 0).cumsum(dim=1)} if case == "documents" else {})


def theirs(inputs: Batch) -> Batch:
    """The same for transformers, which knows documents by their positions, where no mask is given."""
    ours_alone = {"document_ids", "attention_mask"} if "document_ids" in inputs else set()
    return {name: one for name, one in inputs.items() if name not in ours_alone}


def on(device: torch.device | str, inputs: Batch) -> Batch:
    return {name: one.to(device) for name, one in inputs.items()}


def passed(model: Any, inputs: Batch, device: torch.device | str = DEVICE) -> tuple[Tensor, Batch]:
    """Logits of real tokens, and the gradients of the trained weights, computed on `device`; both on the CPU."""
    model, given = model.to(device), on(device, inputs)
    with torch.no_grad():
        logits = model.eval()(**{name: one for name, one in given.items() if name != "labels"}, use_cache=False).logits
    model.train()(**given, use_cache=False).loss.backward()
    real = inputs.get("attention_mask", torch.ones(logits.shape[:2])).bool()
    return logits.cpu()[real], {name: one.cpu() for name, one in gradients(model).items()}


def farthest(found: Batch, expected: Batch) -> float:
    assert found.keys() == expected.keys()
    return max(relative(found[name], one) for name, one in expected.items())


# Parity


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", GEMMAS)
def test_in_float32_it_is_transformers_and_float64(name: str, case: str) -> None:
    inputs = batch(case)
    logits, grads = passed(made(ours, name), inputs)
    their_logits, their_grads = passed(made(reference, name, fused=False), theirs(inputs))
    truth = passed(made(ours, name, attn_implementation="eager").double(), inputs, "cpu")
    assert relative(logits, their_logits) <= NEAR
    assert relative(logits.double(), truth[0]) <= NEAR
    assert farthest(grads, their_grads) <= GRADIENTS_NEAR
    assert farthest(grads, truth[1]) <= GRADIENTS_NEAR


def off_by(found: tuple[Tensor, Batch], truth: tuple[Tensor, Batch]) -> tuple[float, float]:
    """Root mean squares of the differences of logits, and of all gradients, each scaled by its size."""
    parts = [(found[1][name] - one).flatten() / rms(one) for name, one in truth[1].items()]
    return rms(found[0] - truth[0]), rms(torch.cat(parts))


def rms(x: Tensor) -> float:
    return float(x.double().pow(2).mean().sqrt())


@pytest.mark.parametrize("name", GEMMAS)
def test_in_bf16_it_is_as_near_the_truth_as_transformers(name: str) -> None:
    """The truth: the same bf16 weights in float64, from the same embedded tokens (their normaliser is rounded on
    purpose).
    """
    found, allowed = [], []
    for seed in range(2):
        inputs = batch("documents", seed)
        options: dict[str, Any] = {"seed": seed, "dtype": torch.bfloat16}
        exact = made(ours, name, attn_implementation="eager", **options)
        with torch.no_grad():
            embedded = exact.get_input_embeddings()(inputs["input_ids"]).double()
        rest = {key: one for key, one in inputs.items() if key != "input_ids"}
        truth = passed(exact.double(), {"inputs_embeds": embedded, **rest}, "cpu")
        found.append(off_by(passed(made(ours, name, **options), inputs), truth))
        allowed.append(off_by(passed(made(reference, name, fused=False, **options), theirs(inputs)), truth))
    for our_error, their_error in zip(zip(*found, strict=True), zip(*allowed, strict=True), strict=True):
        assert 0 < sum(our_error) <= SLACK * sum(their_error), (our_error, their_error)


@pytest.mark.skipif(not CUDA, reason="FlexAttention is what a GPU has")
def test_flexattention_is_what_runs_at_head_dim_256() -> None:
    why = reason_against(torch.device("cuda", torch.cuda.current_device()), 256, torch.bfloat16)
    if torch.cuda.get_device_capability() < CAPABILITY:
        pytest.skip(f"on this GPU every score is written out: {why}")
    assert why is None


# Laws


def summed(model: Any, inputs: Batch, items: float = 1.0) -> tuple[Tensor, Batch]:
    """The loss over so many tokens, and the gradients; on the CPU."""
    model.zero_grad()
    torch.manual_seed(3)
    loss = model.train()(**on(DEVICE, inputs), use_cache=False, num_items_in_batch=items).loss
    loss.backward()
    return loss.detach().cpu(), {name: one.cpu().clone() for name, one in gradients(model).items()}


def added(parts: list[tuple[Tensor, Batch]]) -> tuple[Tensor, Batch]:
    losses, grads = zip(*parts, strict=True)
    return torch.stack(losses).sum(), {name: sum(one[name] for one in grads) for name in grads[0]}


def assert_alike(found: tuple[Tensor, Batch], expected: tuple[Tensor, Batch]) -> None:
    assert relative(found[0], expected[0]) <= NEAR
    assert farthest(found[1], expected[1]) <= GRADIENTS_NEAR


def pieces(inputs: Batch) -> list[Batch]:
    """The documents of a batch, or its rows where it has none, each alone and without padding."""
    numbers = inputs.get("document_ids", inputs["attention_mask"] - 1)  # -1: padding
    return [
        {name: one[row, numbers[row] == number][None] for name, one in inputs.items()}
        for row in range(len(numbers))
        for number in numbers[row][numbers[row] >= 0].unique()
    ]


def collated() -> Batch:
    """Packed rows of unequal lengths, padded on the right as the collator does."""
    inputs = batch("documents")
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0, "position_ids": 0, "document_ids": -1}
    shown = torch.arange(TOKENS) < torch.tensor([TOKENS, 141, 128])[:, None]
    return {name: pad(one.where(shown, torch.tensor(fill[name])), (0, 3), value=fill[name])
            for name, one in inputs.items()}  # fmt: skip


@pytest.mark.parametrize("name", LAWFUL)
def test_packed_and_padded_rows_are_their_documents_alone(name: str) -> None:
    model, inputs = made(ours, name).to(DEVICE), collated()
    parts = pieces(inputs)
    assert len(parts) == 3 + 2 + 1
    assert_alike(summed(model, inputs), added([summed(model, one) for one in parts]))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", LAWFUL)
def test_padding_and_the_cut_into_micro_batches_change_nothing(name: str, side: str) -> None:
    """The rows at once, padded, are the rows one after the other, over the same count of tokens."""
    model, inputs = made(ours, name).to(DEVICE), batch(f"{side} padding")
    items = float((inputs["labels"] != -100).sum())
    alone = [summed(model, one, items) for one in pieces(inputs)]
    assert_alike(summed(model, inputs, items), added(alone))


@torch.no_grad()
@pytest.mark.parametrize("name", LAWFUL)
def test_no_token_sees_a_later_one(name: str) -> None:
    model, inputs = made(ours, name).to(DEVICE).eval(), batch("documents")
    inputs.pop("labels")
    before = model(**on(DEVICE, inputs)).logits.cpu()
    inputs["input_ids"][:, 100:] = token_rows(3, TOKENS - 100, seed=9)
    after = model(**on(DEVICE, inputs)).logits.cpu()
    assert same({"": after[:, :100]}, {"": before[:, :100]}, 1e-6)
    assert relative(after[:, 100:], before[:, 100:]) > 0.1


@pytest.mark.parametrize("name", LAWFUL)
def test_fault_28_nothing_comes_from_another_document(name: str) -> None:
    model, inputs = made(ours, name).to(DEVICE).train(), on(DEVICE, batch("documents"))
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    last = inputs["document_ids"] == inputs["document_ids"].amax(dim=1, keepdim=True)
    labels = inputs.pop("labels").where(last, IGNORED.to(DEVICE))
    model(inputs_embeds=embedded, labels=labels, **inputs, use_cache=False).loss.backward()
    assert not embedded.grad[~last].any()
    assert embedded.grad[last].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAWFUL)
def test_fault_12_rows_of_padding_stay_finite(name: str, dtype: torch.dtype) -> None:
    """More padding on the left than the window is wide, and a row of nothing else."""
    inputs = batch("left padding")
    inputs["attention_mask"][1] = 0
    inputs["labels"] = inputs["labels"].where(inputs["attention_mask"] > 0, IGNORED)
    model = made(ours, name, dtype=dtype).to(DEVICE).train()
    found = model(**on(DEVICE, inputs), use_cache=False, skip_logits=False)
    found.loss.backward()
    assert found.logits.isfinite().all()
    assert all(one.isfinite().all() and one.any() for one in gradients(model).values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", LAWFUL)
def test_checkpointed_layers_are_the_same_layers(name: str, dropout: float) -> None:
    model, inputs = made(ours, name, dtype=torch.bfloat16, dropout=dropout).to(DEVICE), batch("documents")
    loss, grads = summed(model, inputs)
    for layers in (1, LAYERS):
        checkpoint_layers(model, layers)
        again, recomputed = summed(model, inputs)
        assert same({"loss": again, **recomputed}, {"loss": loss, **grads}, 1e-3)


@pytest.mark.parametrize("case", ["documents", "left padding"])
@pytest.mark.parametrize("name", LAWFUL)
def test_fast_kernels_are_the_plain_ones(name: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = batch(case)
    with kernels(monkeypatch, "off"):
        plain = made(ours, name).to(DEVICE)
        assert type(plain.base_model.model.model.layers[0].mlp.up_proj).__name__ == "Linear"
        expected = summed(plain, inputs)
    fast = made(ours, name).to(DEVICE)
    assert type(fast.base_model.model.model.layers[0].mlp.up_proj).__name__ == "FusedLinear"
    assert_alike(summed(fast, inputs), expected)


def test_the_lengths_and_batches_of_a_run_stay_compiled() -> None:
    """torch gives up compiling at so many kinds of shapes, and writes every score out from then on, with a warning."""
    model = made(ours, "gemma 2").to(DEVICE)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without torch.compile")
        for tokens in (150, 170, 90, 256, 300, 128, 30) if CUDA else (30, 20):
            for rows in (1, 4, 3):
                ids = token_rows(rows, tokens)
                summed(model, {"input_ids": ids, "labels": ids})
                with torch.no_grad():
                    assert model.eval()(ids.to(DEVICE), use_cache=False).logits.isfinite().all()
