"""Quantized models answer too: nf4 packed or not, int8; packing only where it computes what was asked."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit
from peft.utils.integrations import dequantize_module_weight

from gemma_ft.adapters.quantize import allow_packing, quantization_config
from gemma_ft.build.located import Source
from gemma_ft.build.pretrained import load_base, load_model
from gemma_ft.errors import UserError
from gemma_ft.families.records import PRESETS
from gemma_ft.infer.generate import generate_answers
from gemma_ft.kernels import cpp_backend
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.model.linear import keep_trainable
from gemma_ft.system import environment
from tests.export.tuned import save_tuned, wrap
from tests.parity.amplified import amplify, relative, token_rows

LINEARS = 2 * 7
packs = pytest.mark.skipif(not has_avx512bf16(), reason="this CPU has no AVX512-BF16: bitsandbytes packs nothing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of the tiny preset, amplified."""
    environment.quiet_libraries()
    target = tmp_path_factory.mktemp("quantized") / "model"
    model = GemmaForCausalLM(PRESETS["gemma-tiny"].config(vocab_size=101, num_hidden_layers=2, sliding_window=8))
    amplify(model)
    model.save_pretrained(str(target))
    return target


def opened(folder: Path, dtype: torch.dtype, *, trainable: bool) -> Any:
    return load_base(Source(str(folder), None), dtype=dtype, quantize="nf4", trainable=trainable).eval()


def packed(model: Any) -> int:
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == LINEARS
    return sum(bool(getattr(layer.weight.quant_state, "packing_format_for_cpu", False)) for layer in layers)


@pytest.fixture
def without_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' layers, as where no compiler is."""
    monkeypatch.setattr(cpp_backend, "operations", lambda: cpp_backend.Operations({}, "none"))


def test_with_our_product_nothing_is_packed(folder: Path) -> None:
    if not cpp_backend.operations().functions:
        pytest.skip(cpp_backend.operations().reason)
    model = load_model(folder, dtype=torch.bfloat16, quantize="nf4")
    exact = opened(folder, torch.float32, trainable=True)
    stock = load_base(Source(str(folder), None), dtype=torch.bfloat16, trainable=True).eval()
    with torch.no_grad():
        truth = exact(token_rows()).logits
        assert relative(model(token_rows()).logits, truth) < 2 * relative(stock(token_rows()).logits, truth)
    assert packed(model) == 0


@pytest.mark.usefixtures("without_cpp")
@packs
def test_packed_nf4_is_as_near_to_its_float32_truth_as_unpacked_nf4(folder: Path) -> None:
    ids = token_rows()
    with torch.no_grad():
        fast, plain, truth = (
            opened(folder, dtype, trainable=trainable)
            for dtype, trainable in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True))
        )
        exact = truth(ids).logits
        error = [relative(model(ids).logits, exact) for model in (fast, plain)]
    assert (packed(fast), packed(plain), packed(truth)) == (LINEARS, 0, 0)
    assert error[0] <= 2 * error[1]


@pytest.mark.usefixtures("without_cpp")
@packs
def test_only_models_that_are_asked_in_bf16_are_packed(folder: Path) -> None:
    for dtype, expected in ((torch.float32, 0), (torch.bfloat16, LINEARS)):
        model = load_model(folder, dtype=dtype, quantize="nf4")
        with torch.no_grad():
            model(token_rows())
        assert packed(model) == expected


def test_shapes_that_the_packed_kernel_does_not_take_are_left_alone() -> None:
    layers = torch.nn.ModuleList(
        Linear4bit(width, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        for width, rows in ((64, 32), (64, 40), (96, 32))
    ).to("cpu")
    expected = has_avx512bf16()
    assert allow_packing(layers) == int(expected)
    assert [type(layer).__name__ for layer in layers] == [
        "PackedLinear4bit" if expected else "Linear4bit",
        *["Linear4bit"] * 2,
    ]
    with torch.no_grad():
        for layer in layers[:1].eval():
            assert layer(torch.ones(1, layer.in_features, dtype=torch.bfloat16)).isfinite().all()
    assert keep_trainable(layers) == 3
    assert [layer.support_avx512bf16_for_cpu for layer in layers] == [False] * 3


def fresh(folder: Path, **more: Any) -> Any:
    """The public class, as a notebook loads it."""
    config = quantization_config("nf4", compute_dtype=torch.bfloat16, **{"double_quant": True, **more})
    return GemmaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)


def gradient(model: Any) -> float:
    """The norms of a LoRA's gradients, summed."""
    wrapped = wrap(model).train()
    wrapped(input_ids=token_rows(), labels=token_rows()).loss.backward()
    return sum(float(weight.grad.float().norm()) for weight in wrapped.parameters() if weight.grad is not None)


ASK: dict[str, Any] = {
    "generate": lambda model: model.generate(token_rows(), max_new_tokens=3, do_sample=False),
    "a pass": lambda model: model(token_rows()),
    "one row": lambda model: model(token_rows(1, 1)),
}


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("how", ASK)
def test_a_model_that_has_answered_trains_with_its_whole_gradient(folder: Path, how: str, double_quant: bool) -> None:
    """bitsandbytes 0.50.2 packs the weights of a stock layer on CPUs with AVX512-BF16: an eighth of it was left."""
    model = fresh(folder, double_quant=double_quant).eval()
    with torch.no_grad():
        ASK[how](model)
    assert gradient(model) == pytest.approx(gradient(fresh(folder, double_quant=double_quant)), rel=1e-6)


def test_a_loaded_model_that_has_answered_trains_with_its_whole_gradient(folder: Path) -> None:
    if not cpp_backend.operations().functions:
        pytest.skip(cpp_backend.operations().reason)
    model = load_model(folder, dtype=torch.bfloat16, quantize="nf4")
    with torch.no_grad():
        model(token_rows())
    assert gradient(model) == pytest.approx(
        gradient(load_model(folder, dtype=torch.bfloat16, quantize="nf4")), rel=1e-6
    )


@pytest.mark.usefixtures("without_cpp")
@packs
def test_a_packed_model_refuses_a_backward_and_nothing_else(folder: Path) -> None:
    model = load_model(folder, dtype=torch.bfloat16, quantize="nf4")
    with torch.no_grad():
        first = model(token_rows()).logits
    assert packed(model) == LINEARS
    assert torch.equal(model(token_rows()).logits, first), "asked with gradients on, which nobody wants"
    with pytest.raises(UserError) as caught:
        gradient(model)
    assert str(caught.value) == (
        "4-bit weights that have answered are packed for this CPU, and pass no gradient; load the model with "
        "GemmaForCausalLM.from_pretrained to train it"
    )


@pytest.mark.usefixtures("without_cpp")
def test_a_model_that_may_be_packed_and_has_not_answered_trains(folder: Path) -> None:
    asked_later = load_model(folder, dtype=torch.bfloat16, quantize="nf4")
    assert gradient(asked_later) == pytest.approx(gradient(fresh(folder)), rel=1e-6)


def answers(model: Any, batch_size: int) -> Any:
    prompts = [row[:length].tolist() for row, length in zip(token_rows(4, 12), (12, 3, 9, 7), strict=True)]
    return generate_answers(model, prompts, stop_ids=[1], max_new_tokens=12, batch_size=batch_size)


def test_nf4_in_float32_answers_alike_batched_and_alone(folder: Path) -> None:
    model = load_model(folder, dtype=torch.float32, quantize="nf4")
    assert answers(model, 4) == answers(model, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("quantize", "within"), [("nf4", 1e-2), ("int8", 5e-2)])
def test_a_quantized_model_says_what_its_dequantized_weights_say(
    folder: Path, quantize: str, within: float, dtype: torch.dtype
) -> None:
    """int8 also rounds activations, to 8 bits of each row's largest: 1/254, through 14 products."""
    ids = token_rows()
    model, exact = load_model(folder, dtype=dtype, quantize=quantize), load_model(folder, dtype=torch.float32)
    with torch.no_grad():
        unrounded = exact(ids).logits
        for name, module in exact.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.copy_(dequantize_module_weight(model.get_submodule(name)))
        expected, found = exact(ids).logits, model(ids).logits
    assert relative(found, expected) <= within * (1 if dtype == torch.float32 else 4)
    assert relative(unrounded, expected) > 1e-2, "quantization is hardly seen: a weak test"
    assert all(len(answer.ids) == 12 or answer.stopped for answer in answers(model, 3))


@pytest.fixture
def as_imported() -> Iterator[list[logging.LogRecord]]:
    """bitsandbytes' loggers as a Python session has them that only imported us; what they let through."""
    heard: list[logging.LogRecord] = []
    ear = logging.Handler()
    ear.emit = heard.append  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in environment.BITSANDBYTES_CHATTER]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.NOTSET)
        logger.addHandler(ear)
    above = logging.getLogger("bitsandbytes")
    level = above.level
    above.setLevel(logging.NOTSET)
    yield heard
    above.setLevel(level)
    for logger, old in zip(loggers, before, strict=True):
        logger.removeHandler(ear)
        logger.setLevel(old)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_int8_says_nothing_at_every_product(
    folder: Path, dtype: torch.dtype, as_imported: list[logging.LogRecord]
) -> None:
    """bitsandbytes 0.50 logs a cast to float16 in each forward of each layer."""
    ids = token_rows(1, 6)
    model = load_model(folder, dtype=dtype, quantize="int8")
    model(ids)
    model.generate(ids, max_new_tokens=2, do_sample=False)
    trained = load_base(Source(str(folder), None), dtype=dtype, quantize="int8", trainable=True).train()
    trained(ids, labels=ids)
    assert [record.getMessage() for record in as_imported] == []


def test_other_words_of_bitsandbytes_are_heard(folder: Path, as_imported: list[logging.LogRecord]) -> None:
    load_model(folder, dtype=torch.bfloat16, quantize="int8")
    logging.getLogger(environment.BITSANDBYTES_CHATTER[0]).error("damaged")
    assert [record.getMessage() for record in as_imported] == ["damaged"]


@pytest.mark.parametrize(
    ("kind", "settings", "line"),
    [
        ("int8", {"use_dora": True},
         "use_dora is set, which cannot be computed over int8 weights; take nf4, or the weights as they are"),
        ("int8", {"use_dora": True, "target_modules": ["lm_head"]},
         "use_dora is set, which cannot be computed over int8 weights; take nf4, or the weights as they are"),
        ("nf4", {"modules_to_save": ["down_proj"]},
         "modules_to_save names down_proj, which cannot be computed over nf4 weights; take them as they are"),
        ("int8", {"velora_config": {"num_groups": 8}},
         "velora_config is set, which cannot be computed over int8 weights; take them as they are"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_quantized_layers_cannot_have_is_refused(
    kind: str, settings: dict[str, Any], line: str, folder: Path, tmp_path: Path
) -> None:
    model = load_base(Source(str(folder), None), dtype=torch.float32)
    save_tuned(tmp_path, folder, model, contract=False, **{"target_modules": ["q_proj"], **settings})
    with pytest.raises(UserError) as caught:
        load_model(tmp_path, dtype=torch.float32, quantize=kind)
    assert str(caught.value) == f"{tmp_path}/adapter_config.json: {line}"
    assert load_model(tmp_path, dtype=torch.float32) is not None


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize(
    "settings", [{"trainable_token_indices": [9, 5]}, {"modules_to_save": ["norm"]}, {"r": 2}], ids=str
)
def test_others_are_computed_over_quantized_weights(
    kind: str, settings: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    """As over the float32 weights that bitsandbytes 0.50.2 gives back, twice alike."""
    save_tuned(
        tmp_path, folder, load_base(Source(str(folder), None), dtype=torch.float32), contract=False,
        **{"target_modules": ["q_proj"], **settings},
    )  # fmt: skip
    found, exact = (load_model(tmp_path, dtype=torch.float32, quantize=one) for one in (kind, None))
    plain = load_model(folder, dtype=torch.float32, quantize=kind)
    with torch.no_grad():
        for name, module in exact.get_base_model().named_modules():
            if name.endswith("_proj"):
                base = module.base_layer if hasattr(module, "base_layer") else module
                base.weight.copy_(dequantize_module_weight(plain.get_submodule(name)))
        expected, first, second = exact(token_rows()).logits, found(token_rows()).logits, found(token_rows()).logits
    assert torch.equal(first, second)
    assert relative(first, expected) <= (1e-5 if kind == "nf4" else 5e-2)
