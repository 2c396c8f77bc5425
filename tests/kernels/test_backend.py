"""The table of implementations: what it names is there, what it chooses is what is meant, and each computes what the
reference does.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from torch import Tensor

from gemma_ft.kernels import backend, cpp_backend, flex_attention, matmul
from gemma_ft.kernels.add_lora import add_lora_reference, lora_implementation
from gemma_ft.kernels.attention import eager_attention
from gemma_ft.kernels.backend import OPERATIONS, Implementation, choice_of, describe, implementation_of, what_runs
from gemma_ft.kernels.cross_entropy import fused_cross_entropy, fused_cross_entropy_reference
from gemma_ft.kernels.gemv import gemv
from gemma_ft.kernels.nf4 import dequantize_nf4, dequantize_nf4_reference, nf4_product
from gemma_ft.kernels.optimizer_step import Rates, new_moments, optimizer_step_reference
from gemma_ft.kernels.plain_tensors import DTYPES
from gemma_ft.kernels.triton import triton_backend as triton
from gemma_ft.kernels.triton.triton_backend import load
from gemma_ft.model.attention import BACKENDS, AttentionMask
from tests.kernels import test_operations as rows
from tests.kernels.forced import force
from tests.kernels.test_operations import drawn, error
from tests.model import test_decode as decoding

ALL = [one for of in OPERATIONS.values() for one in of]
FASTER = [(one, dtype) for one in ALL if one.name != "torch" for dtype in one.dtypes or DTYPES]
WIDTH, TOKENS, CAP = 32, 40, 5.0
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def named(one: Any) -> str:
    return f"{one.operation}-{one.name}" if isinstance(one, Implementation) else str(one).removeprefix("torch.")


FOLDER = Path(backend.__file__).parent


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: str(path.relative_to(FOLDER)))
def test_modules_are_loaded_by_the_table_alone(path: Path) -> None:
    """No function imports one of ours, and only what the table calls Triton's, or what they share, imports Triton."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [one for one in ast.walk(tree) if isinstance(one, ast.FunctionDef)]
    late = {name for one in functions for node in ast.walk(one) for name in modules_of(node)}
    assert not {name for name in late if name.startswith("gemma_ft")}
    if any(name.split(".")[0] == "triton" for node in ast.walk(tree) for name in modules_of(node)):
        assert path.parent == Path(triton.__file__).parent


def modules_of(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [one.name for one in node.names] if isinstance(node, ast.Import) else []


# what is chosen on a GPU, on a CPU with the C++, and without
CHOSEN = {
    "rms_norm": ("triton", "cpp", "torch"),
    "rotary": ("triton", "cpp", "torch"),
    "geglu": ("triton", "cpp", "torch"),
    "cross_entropy": ("triton", "cpp", "torch"),
    "attention": ("flex", "cpu", "cpu"),
    "attention_block": ("torch", "cpp", "torch"),
    "decode_attention": ("triton", "cpu", "cpu"),
    "nf4": ("triton", "cpp", "torch"),
    "nf4_gemv": ("triton", "cpp", "torch"),
    "gemv": ("torch", "cpp", "torch"),
    "lora_gemv": ("triton", "torch", "torch"),
    "fused_decode": ("torch", "cpp", "torch"),
    "optimizer_step": ("torch", "cpp", "torch"),
    "matmul": ("torch", "float32", "float32"),
}


@pytest.fixture
def everything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with Triton and FlexAttention, and a CPU with the C++ that multiplies float32 faster: as they say so."""
    monkeypatch.setattr(triton, "reason_against", lambda *_: None)
    monkeypatch.setattr(flex_attention, "reason_against", lambda *_: None)
    monkeypatch.setattr(flex_attention, "fitting", lambda *_: flex_attention.Fit(flex_attention.TILES[0], "", 1.0))
    monkeypatch.setattr(cpp_backend, "operations", lambda: cpp_backend.Operations({"any": None}, "C++"))
    monkeypatch.setattr(matmul, "widens", lambda: True)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_has_a_reference_that_takes_everything(operation: str) -> None:
    *faster, reference = OPERATIONS[operation]
    assert (reference.name, reference.backend.device, reference.dtypes) == ("torch", "", ())
    assert reference.serves(torch.empty(2, dtype=torch.float64, device="meta"))
    names = [one.name for one in faster]
    assert "torch" not in names
    assert len(set(names)) == len(names) > 0
    for device in (CPU, CUDA, torch.device("meta")):
        for dtype in (torch.float64, torch.float16):
            chosen = choice_of(operation, device, dtype, head_dim=256)
            assert chosen.implementation.dtypes == ()
            assert implementation_of(operation, torch.empty(2, dtype=dtype, device="meta"), fits=False) is reference


@pytest.mark.parametrize("one", ALL, ids=named)
def test_what_the_table_names_is_there(one: Implementation) -> None:
    if one.name == "triton" and find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    assert (one.functions == ()) == (one.module == "")  # made of other operations of the table
    for name in (*one.functions, *([one.takes] if one.takes else [])):
        assert callable(getattr(load(one.module), name)), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_chosen(dtype: torch.dtype, everything_runs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def names(device: torch.device) -> dict[str, str]:
        return {one.implementation.operation: one.implementation.name for one in what_runs(device, dtype, head_dim=256)}

    only_bf16 = {"nf4_gemv", "matmul"} if dtype == torch.float32 else set()  # on a CPU
    with_cpp = {name: "torch" if name in only_bf16 else chosen for name, (_, chosen, _) in CHOSEN.items()}
    assert names(CPU) == with_cpp
    assert names(CUDA) == {name: chosen for name, (chosen, _, _) in CHOSEN.items()}
    monkeypatch.setattr(cpp_backend, "operations", lambda: cpp_backend.Operations({}, "plain torch: no C++ compiler"))
    assert names(CPU) == {name: "torch" if name in only_bf16 else chosen for name, (_, _, chosen) in CHOSEN.items()}
    assert describe(CPU, torch.float32) == "plain torch: no C++ compiler"


def test_why_it_is_chosen_is_said(everything_runs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = "bf16 is multiplied in float32, which this processor does faster"
    assert describe(CPU, torch.bfloat16) == f"C++; {wide}"
    assert describe(CUDA, torch.bfloat16) == "Triton"
    assert describe(torch.device("meta"), torch.bfloat16) == ""
    assert choice_of("attention", CUDA, torch.bfloat16, head_dim=256).reason.startswith("FlexAttention, compiled and")
    monkeypatch.setattr(flex_attention, "fitting", None)  # compiles: not without a head dim
    assert choice_of("attention", CUDA, torch.bfloat16).implementation.name == "torch"
    monkeypatch.setattr(triton, "reason_against", lambda *_: "Triton is not installed")
    assert describe(CUDA, torch.bfloat16) == "plain torch: Triton is not installed"
    assert choice_of("rms_norm", CUDA, torch.bfloat16).implementation.name == "torch"


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_said_is_what_runs(operation: str, dtype: torch.dtype) -> None:
    x = torch.zeros(matmul.MANY, matmul.MANY, dtype=dtype)
    first = next(one for one in OPERATIONS[operation] if one.serves(x, x))
    if operation == "nf4_gemv" and dtype == torch.float32:
        pytest.skip("what of NF4 is float32 says nothing about the rows, which are asked about by `takes`")
    assert choice_of(operation, CPU, dtype).implementation is first


@dataclass(frozen=True)
class Case:
    """An operation as the product calls it, and its reference, of the same inputs; `near`: the greatest error in
    float32, and in bf16: as a number, or (`times`) as many times the error of the reference in bf16; 0: its very bits.
    """

    run: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: list[Tensor]
    near: float
    near_bf16: float
    times: bool = True
    gradients: bool = True


def seen() -> tuple[Tensor, Tensor]:
    """The first key that each token sees, and what each sees: a window of 9."""
    places = torch.arange(TOKENS)
    low = (places - 8).clamp(min=0)[None]
    return low, ((places >= low[:, :, None]) & (places <= places[:, None]))[:, None]


def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    low, mask = seen()
    visible = AttentionMask(lambda: mask.to(query.device), lambda: low.to(query.device))
    return BACKENDS["blockwise"](query, key, value, visible, scale=0.3, softcap=CAP)


def attended_eagerly(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return eager_attention(query, key, value, seen()[1].to(query.device), scale=0.3, softcap=CAP)


HELD = torch.tensor([1, 17, TOKENS])


def asked(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    mask = (torch.arange(TOKENS) < HELD[:, None])[:, None, None].to(query.device)
    visible = AttentionMask(lambda: mask, held=lambda: HELD.to(query.device))
    return BACKENDS["blockwise"](query, keys, values, visible, scale=0.3, softcap=CAP)


def asked_eagerly(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    mask = (torch.arange(TOKENS) < HELD[:, None])[:, None, None].to(query.device)
    return eager_attention(query, keys, values, mask, scale=0.3, softcap=CAP)


def headed(op: Callable[..., Any]) -> Callable[[Tensor], list[Tensor]]:
    def run(logits: Tensor) -> list[Tensor]:
        targets = torch.arange(9, device=logits.device) * 111
        found = op(logits.detach().clone(), targets, None, 30.0, with_grad=True)
        return [found.losses, found.entropies, found.gradient]

    return run


def stored(weight: Tensor) -> tuple[Tensor, Any]:
    """Of the same numbers, whatever they are computed in: float64's is that of bitsandbytes in float32."""
    dtype = torch.float32 if weight.dtype == torch.float64 else weight.dtype
    return quantize_4bit(weight.to(dtype), quant_type="nf4", blocksize=64)


def unpacked(weight: Tensor) -> Tensor:
    return dequantize_nf4(*stored(weight)).to(weight.dtype)


def unpacked_by_bitsandbytes(weight: Tensor) -> Tensor:
    return dequantize_nf4_reference(*stored(weight.float() if weight.dtype == torch.float64 else weight))


def with_lora(x: Tensor, a: Tensor, b: Tensor, base: Tensor) -> Tensor:
    out = base.clone()
    lora_implementation(x, a, b).run(x, a, b, 1.7, out)
    return out


def with_lora_in_torch(x: Tensor, a: Tensor, b: Tensor, base: Tensor) -> Tensor:
    out = base.clone()
    add_lora_reference(x, a, b, 1.7, out)
    return out


def stepped(op: Callable[..., None] | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """A weight after a step of AdamW with moments in 8 bits."""

    def run(weight: Tensor, grad: Tensor) -> Tensor:
        found = weight.detach().clone()
        state, rates = new_moments("adam", found) | {"step": 1}, Rates(0.1, (0.9, 0.999), 1e-8, 0.1)
        (op or implementation_of("optimizer_step", found, grad).run)("adam", found, grad, state, rates)
        return found

    return run


def heads(*counts: int, tokens: int = TOKENS, batch: int = 2) -> list[Tensor]:
    return [drawn(batch, count, tokens, WIDTH, seed=seed, times=2.0) for seed, count in enumerate(counts)]


def of_rows(name: str) -> Case:
    run, reference, inputs = rows.CASES[name]
    return Case(run, reference, inputs, 5e-7, 1.05)


CASES: dict[str, Case] = {
    "rms_norm": of_rows("norm + residual"),
    "rotary": of_rows("rotary"),
    "geglu": of_rows("geglu"),
    "cross_entropy": Case(
        headed(fused_cross_entropy),
        headed(fused_cross_entropy_reference),
        [drawn(9, 1003, times=12.0)],
        5e-6,
        4e-3,
        False,
        False,
    ),
    "optimizer_step": Case(
        stepped(), stepped(optimizer_step_reference), [drawn(4133), drawn(4133, seed=1)], 5e-7, 1.05, gradients=False
    ),
    "attention": Case(attended, attended_eagerly, heads(4, 2, 2), 1e-5, 1.25, gradients=False),
    "attention_block": Case(attended, attended_eagerly, heads(4, 2, 2), 1e-5, 1.25),
    "decode_attention": Case(
        asked, asked_eagerly, [*heads(4, tokens=1, batch=3), *heads(2, 2, batch=3)], 4e-6, 1.05, gradients=False
    ),
    "nf4": Case(unpacked, unpacked_by_bitsandbytes, [drawn(64, 384)], 0.0, 0.0, False, False),
    "nf4_gemv": Case(
        lambda x, w: nf4_product(x, *stored(w)), lambda x, w: x @ unpacked_by_bitsandbytes(w).to(x.dtype).T,
        [drawn(5, 384), drawn(64, 384, seed=1)], 1e-6, 4e-3, False, False,
    ),
    "gemv": Case(gemv, lambda x, w: x @ w.T, [drawn(5, 384), drawn(64, 384, seed=1)], 1e-6, 4e-3, False, False),
    "lora_gemv": Case(
        with_lora, with_lora_in_torch, [drawn(3, 1500), drawn(8, 1500, seed=1), drawn(100, 8, seed=2), drawn(3, 100)],
        2e-6, 1.1, gradients=False,
    ),
    "matmul": Case(
        matmul.times, torch.matmul, [drawn(matmul.MANY, 56), drawn(56, 40, seed=1)], 0.0, 1.05, gradients=False
    ),
}  # fmt: skip


def test_each_operation_is_compared() -> None:
    assert CASES.keys() | {"fused_decode"} == OPERATIONS.keys() == CHOSEN.keys()


def results(case: Case, run: Callable[..., Any], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """What an operation gives, and its gradients, in float64 on the CPU; from inputs in `dtype`."""
    if case.gradients:
        return rows.run(run, case.inputs, dtype, device=device)
    found = run(*(one.to(device, dtype) for one in case.inputs))
    return [one.detach().cpu().double() for one in (found if isinstance(found, list) else [found])]


@pytest.mark.parametrize(("one", "dtype"), FASTER, ids=named)
def test_it_computes_what_the_reference_does(
    one: Implementation, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if one.operation == "fused_decode":
        of_all_layers(one, dtype, monkeypatch)
        return
    case = CASES[one.operation]
    rounded = Case(case.run, case.reference, [as_given(x, dtype) for x in case.inputs], 0, 0, gradients=case.gradients)
    truth = results(rounded, case.reference, torch.float32 if one.operation == "rotary" else torch.float64)
    plain = results(rounded, case.reference, dtype)
    device, ran = force(monkeypatch, one.name), noted(one, monkeypatch)
    found = results(rounded, case.run, dtype, device)
    assert ran, "another implementation was compared"
    for got, expected, true in zip(found, plain, truth, strict=True):
        limit = case.near
        if dtype == torch.bfloat16:
            limit = case.near_bf16 * error(expected, true) if case.times else case.near_bf16
        assert torch.equal(got, expected) if limit == 0 else error(got, true) <= limit


def as_given(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What it is in `dtype`; weights of one dimension stay float32 where the rest is bf16."""
    return x.to(torch.float32 if x.dim() == 1 else dtype).double()


def noted(one: Implementation, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the implementation's functions were called."""
    module, ran = load(one.module), []

    def noting(name: str, plain: Any) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            ran.append(name)
            return plain(*given, **options)

        return call

    for name in one.functions:
        monkeypatch.setattr(module, name, noting(name, getattr(module, name)))
    return ran


def of_all_layers(one: Implementation, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass through all layers is one layer after the other, whose operations the rest of this file compares."""
    device = force(monkeypatch, one.name)
    assert device == "cpu"
    ran, models = noted(one, monkeypatch), {name: decoding.model_of(name, dtype) for name in decoding.GEMMAS}
    found = {name: decoding.states(model, [4, 9], 3) for name, model in models.items()}
    assert ran == ["decode"] * 3 * len(models)
    ran.clear()
    monkeypatch.setattr(backend, "OPERATIONS", OPERATIONS | {one.operation: OPERATIONS[one.operation][-1:]})
    for name, model in models.items():
        plain, truth = decoding.states(model, [4, 9], 3), decoding.states(model.float(), [4, 9], 3)
        apart = decoding.distance(plain, truth)
        assert decoding.distance(found[name], truth) < (1e-5 if dtype == torch.float32 else 1.2 * apart)
    assert not ran
