"""What a run says about its device before it begins."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.families.chat_template import TURNS
from gemma_ft.kernels import cpp_backend, flex_attention, matmul
from gemma_ft.kernels.triton import triton_backend as gpu
from gemma_ft.recipe.batch_plan import BatchPlan
from gemma_ft.recipe.load import load_recipe
from gemma_ft.train import startup
from tests.foreign import CHATML, TEMPLATES, foreign_tokenizer


def base(device: str) -> SimpleNamespace:
    """As much of a Gemma 2 as is asked."""
    return SimpleNamespace(
        device=torch.device(device), dtype=torch.bfloat16,
        config=SimpleNamespace(_attn_implementation="blockwise", head_dim=256),
        model=SimpleNamespace(numerics=SimpleNamespace(attn_softcap=50.0)),
    )  # fmt: skip


@pytest.mark.parametrize("wide", [True, False])
def test_on_a_cpu(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_backend, "operations", lambda: cpp_backend.Operations({}, "C++"))
    monkeypatch.setattr(matmul, "widens", lambda: wide)
    told = "C++; bf16 is multiplied in float32, which this processor does faster"
    assert startup._device_rows(base("cpu"), "bf16") == [("kernels", told if wide else "C++")]
    assert startup._device_rows(base("cpu"), "float32") == [("kernels", "C++")]


def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "reason_against", lambda *_: None)
    monkeypatch.setattr(flex_attention, "reason_against", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    fit = flex_attention.Fit(flex_attention.TILES[1], "", 12.4)
    monkeypatch.setattr(flex_attention, "fitting", lambda *_: fit)
    told = (
        "FlexAttention in smaller tiles, for the shared memory of this GPU, compiled and tried in 12 s, kept on "
        "the disk"
    )
    assert startup._device_rows(base("cuda"), "bf16") == [("kernels", "Triton"), ("", told)]
    monkeypatch.setattr(gpu, "reason_against", lambda *_: "Triton is not installed")
    monkeypatch.setattr(flex_attention, "reason_against", lambda *_: "Triton is not installed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert startup._device_rows(base("cuda"), "bf16") == [
        ("kernels", "plain torch: Triton is not installed"),
        ("", "every score of attention is written out: Triton is not installed"),
        ("", "this GPU has no bf16 of its own and is slow in it; train.precision=float32 may be faster"),
    ]
    uncapped = base("cuda")
    uncapped.model.numerics.attn_softcap = None
    told = ("", "attention is torch's SDPA with a mask: Triton is not installed")
    assert startup._device_rows(uncapped, "float32")[1:] == [told]


@pytest.mark.parametrize(
    ("micro", "tokens", "total", "ranks", "enough"),
    [(4, 1024, 32, 1, None), (4, 200, 32, 1, 32), (4, 600, 32, 1, 8), (4, 100, 32, 2, 16), (8, 100, 8, 1, None)],
)
def test_small_micro_batches_on_a_gpu_are_told(
    micro: int, tokens: int, total: int, ranks: int, enough: int | None
) -> None:
    found = startup._small(BatchPlan(total, micro, total // (micro * ranks), ranks), tokens)
    if enough is None:
        assert found == []
    else:
        ((_, told),) = found
        assert f"about {micro * tokens:,} tokens" in told
        assert f"train.micro_batch_size={enough} would make them {enough * tokens:,}" in told


@pytest.mark.parametrize(
    ("template", "own"),
    [
        (CHATML, "ChatML"),
        (TEMPLATES["Llama 3's headers"], "Llama 3's headers"),
        ("{% for message in messages %}{{ message['content'] }}{% endfor %}", "a template that is not known here"),
        (TEMPLATES["Gemma's turns, system refused"], None),
        (None, None),
    ],
    ids=["ChatML", "Llama 3", "unknown", "Google's own", "none"],
)
def test_a_base_that_was_tuned_in_another_template_is_told(template: str | None, own: str | None) -> None:
    tokenizer = foreign_tokenizer()
    tokenizer.chat_template = template or TURNS.text("fold")
    told = f"the base was tuned in {own}; this run trains Gemma's turns, in which it is then asked"
    assert startup._template_rows(ChatEncoder(tokenizer)) == ([("chats", told)] if own else [])


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["objective=dpo"], "the same model, its adapter switched off; no dropout"),
        (["objective=ipo", "adapter.start=runs/first"], "the adapter that it starts from, frozen; no dropout"),
        (
            ["objective=dpo", "strategy=full"],
            "the model as it is now, its log-probabilities computed before training; no dropout",
        ),
        (
            ["objective.kind=dpo", "objective.reference=other", "objective.dropout=true"],
            "the model in other, its log-probabilities computed before training",
        ),
        (["objective=simpo"], "nothing: it has no reference; no dropout"),
    ],
)
def test_what_is_compared_with_is_told(overrides: list[str], told: str) -> None:
    recipe = load_recipe("sft_tiny", ["strategy=lora", *overrides]).recipe
    (_, minimized), (_, against) = startup._objective_rows(recipe, SimpleNamespace())
    assert minimized.startswith(f"{recipe.objective.kind}, beta ")
    assert against == f"compared with {told}"


def test_supervised_fine_tuning_says_nothing_of_its_objective() -> None:
    assert startup._objective_rows(load_recipe("sft_tiny").recipe, SimpleNamespace()) == []
