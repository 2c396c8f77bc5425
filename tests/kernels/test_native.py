"""The operations in C++ against plain torch: values, gradients, rounding, layouts, and what happens without them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from gemma_ft import runtime
from gemma_ft.kernels import native
from gemma_ft.kernels.geglu import geglu, geglu_reference
from gemma_ft.kernels.head_rows import head_rows, head_rows_reference
from gemma_ft.kernels.nf4 import dequantize_nf4
from gemma_ft.kernels.rms_norm import rms_norm, rms_norm_reference
from gemma_ft.kernels.rotary import rotate, rotate_reference

built = pytest.mark.skipif(not native.operations().functions, reason=native.operations().reason)
DTYPES = [torch.float32, torch.bfloat16]
Op = Callable[..., Tensor]


def drawn(*shape: int, seed: int = 0, times: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * times


def angles(batch: int, tokens: int, width: int) -> tuple[Tensor, Tensor]:
    half = drawn(batch, 1, tokens, width // 2, seed=9, times=5.0).float()
    both = torch.cat((half, half), dim=-1)
    return both.cos(), both.sin()


def turned(op: Op) -> Op:
    return lambda x: op(x.transpose(1, 2), *angles(2, 9, 34))


# name -> the operation, its reference, its inputs; sizes that no vector divides, values where everything bends
CASES: dict[str, tuple[Op, Op, list[Tensor]]] = {
    "norm": (
        lambda x, w: rms_norm(x, w, 1e-6),
        lambda x, w: rms_norm_reference(x, w, 1e-6),
        [drawn(3, 5, 77, times=4.0), drawn(77, seed=1)],
    ),
    "norm + residual": (
        lambda x, w, r: rms_norm(x, w, 1e-6, r),
        lambda x, w, r: rms_norm_reference(x, w, 1e-6, r),
        [drawn(3, 5, 77, times=4.0), drawn(77, seed=1), drawn(3, 5, 77, seed=2)],
    ),
    "norm of many rows": (
        lambda x, w: rms_norm(x, w, 1e-6),
        lambda x, w: rms_norm_reference(x, w, 1e-6),
        [drawn(400, 100, times=4.0), drawn(100, seed=1)],
    ),
    "rotary": (turned(rotate), turned(rotate_reference), [drawn(2, 9, 3, 34)]),
    "geglu": (geglu, geglu_reference, [drawn(7, 333, times=5.0), drawn(7, 333, seed=1)]),
}


def run(op: Op, inputs: list[Tensor], dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    """An operation's result and its gradients in float64, from inputs in `dtype`; a weight of one dimension is float32
    where the rest is bf16.
    """
    given = [
        one.detach().to(torch.float32 if one.dim() == 1 and dtype == torch.bfloat16 else dtype).requires_grad_()
        for one in inputs
    ]
    out = op(*given)
    upstream = drawn(*out.shape, seed=7).to(out.dtype) * scale
    return [one.double() for one in (out.detach(), *torch.autograd.grad(out, given, upstream))]


def error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm().clamp(min=1e-30))


@built
@pytest.mark.parametrize("name", CASES)
def test_in_float32_it_is_the_reference(name: str) -> None:
    op, reference, inputs = CASES[name]
    truth = run(reference, inputs, torch.float64) if name != "rotary" else run(reference, inputs, torch.float32)
    for found, expected in zip(run(op, inputs, torch.float32), truth, strict=True):
        assert error(found, expected) < 5e-7


@built
@pytest.mark.parametrize("name", CASES)
def test_in_bf16_it_is_as_near_to_the_truth_as_the_reference(name: str) -> None:
    op, reference, inputs = CASES[name]
    rounded = [one.bfloat16().double() if one.dim() > 1 else one.float().double() for one in inputs]
    truth = run(reference, rounded, torch.float64 if name != "rotary" else torch.float32)
    found, expected = run(op, rounded, torch.bfloat16), run(reference, rounded, torch.bfloat16)
    for one, other, true in zip(found, expected, truth, strict=True):
        assert error(one, true) <= 1.05 * error(other, true)


@built
@pytest.mark.parametrize("scale", [1.0, 0.25, 0.0])
@pytest.mark.parametrize("name", CASES)
def test_the_upstream_gradient_counts(name: str, scale: float) -> None:
    op, _, inputs = CASES[name]
    whole, part = run(op, inputs, torch.float32), run(op, inputs, torch.float32, scale)
    for one, other in zip(whole[1:], part[1:], strict=True):
        assert torch.equal(one * scale, other)


@built
def test_an_input_may_be_used_twice() -> None:
    both = [
        run(op, [drawn(4, 33)], torch.float32)
        for op in (lambda x: geglu(x, x) + x, lambda x: geglu_reference(x, x) + x)
    ]
    assert all(error(one, other) < 5e-7 for one, other in zip(*both, strict=True))


@built
@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("cap", [None, 30.0, 15.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_head_is_the_reference(dtype: torch.dtype, cap: float | None, with_weights: bool) -> None:
    logits, targets = drawn(9, 1003, times=12.0).to(dtype), torch.arange(9) * 111
    targets[3] = logits[3].float().argmax()
    logits[4, 800] = logits[4, 700] = logits[4].max() + 9  # a tie: the first counts
    targets[4] = 700
    weights = drawn(9, seed=3).abs() if with_weights else None
    truth = head_rows_reference(logits.double(), targets, weights, cap, with_grad=True)
    found = head_rows(logits.clone(), targets, weights, cap, with_grad=True)
    assert error(found[0].double(), truth[0]) < 1e-6
    assert found[1].tolist() == truth[1].tolist() == [at in (3, 4) for at in range(9)]
    assert found[2] is not None
    assert truth[2] is not None
    assert found[2].dtype == dtype
    assert error(found[2].double(), truth[2]) < {torch.float32: 5e-6, torch.bfloat16: 4e-3}[dtype]
    assert head_rows(logits.clone(), targets, weights, cap, with_grad=False)[2] is None


@built
@pytest.mark.parametrize("cap", [None, 30.0])
def test_what_is_no_number_is_seen_in_the_loss(cap: float | None) -> None:
    logits = drawn(2, 50).float()
    logits[1, 20] = float("nan")
    losses, _, _ = head_rows(logits, torch.tensor([3, 4]), None, cap, with_grad=True)
    assert losses.isfinite().tolist() == [True, False]
    assert not rms_norm(logits, torch.zeros(50), 1e-6)[1].isfinite().any()
    assert not geglu(logits, logits)[1, 20].isfinite()


@built
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("block", [32, 64, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_4_bit_weights_are_bitsandbytes_own_to_the_bit(dtype: torch.dtype, block: int, nested: bool) -> None:
    weight = (drawn(96, 512, times=0.02) * (1 + 50 * (drawn(96, 512, seed=1) > 3))).to(dtype)
    packed, state = quantize_4bit(weight, blocksize=block, quant_type="nf4", compress_statistics=nested)
    expected = dequantize_4bit(packed, state)
    assert torch.equal(dequantize_nf4(packed, state), expected)
    stored = packed.flatten().view(torch.bfloat16)[:, None]  # as FSDP has them
    into = torch.empty_like(expected)
    assert dequantize_nf4(stored, state, out=into) is into
    assert torch.equal(into, expected)


@built
def test_blocks_across_rows_are_left_to_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, state = quantize_4bit(drawn(96, 160).float(), blocksize=64, quant_type="nf4")
    monkeypatch.setattr(native, "call", None)
    assert torch.equal(dequantize_nf4(packed, state), dequantize_4bit(packed, state))


@built
def test_the_count_of_threads_changes_nothing() -> None:
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([run(op, inputs, torch.float32) for op, _, inputs in CASES.values()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.fixture
def anew() -> Iterator[None]:
    """The operations are looked for again, and once more afterwards."""
    native.operations.cache_clear()
    yield
    native.operations.cache_clear()


def failing_compiler(folder: Path) -> Path:
    script = folder / "no-cxx"
    script.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'omp.h: not found' >&2; exit 1\n")
    script.chmod(0o755)
    return script


@pytest.mark.parametrize("why", ["off", "none", "broken", "open"])
def test_without_them_plain_torch_runs_and_says_why(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: None
) -> None:
    monkeypatch.setenv("GEMMA_FT_CACHE", str(tmp_path / "cache"))
    if why == "off":
        monkeypatch.setenv("GEMMA_FT_KERNELS", "off")
    elif why == "none":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
    elif why == "broken":
        monkeypatch.setenv("CXX", str(failing_compiler(tmp_path)))
    else:
        (tmp_path / "cache" / "kernels").mkdir(parents=True)
        os.chmod(tmp_path / "cache" / "kernels", 0o777)
    said = {
        "off": "plain torch and PEFT, as GEMMA_FT_KERNELS=off asks",
        "none": "plain torch: no C++ compiler; with g++ installed steps are faster",
        "broken": "plain torch: no-cxx could not build the C++ ones (omp.h: not found)",
        "open": f"{tmp_path}/cache/kernels can be written by others",
    }[why]
    if why != "open":
        assert native.operations().reason == said
    elif native.operations().reason != "plain torch: no C++ compiler; with g++ installed steps are faster":
        assert said[:60] in native.operations().reason
    assert not native.operations().functions
    assert not list(tmp_path.rglob("*.so"))
    op, reference, inputs = CASES["geglu"]
    for one, other in zip(run(op, inputs, torch.float32), run(reference, inputs, torch.float32), strict=True):
        assert torch.equal(one, other)


@built
def test_it_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: None) -> None:
    monkeypatch.setenv("GEMMA_FT_CACHE", str(tmp_path))
    assert native.operations().functions
    made = {one: one.stat().st_mtime_ns for one in (tmp_path / "kernels").iterdir()}
    assert {one.suffix for one in made} == {".so", ".sha256"}
    native.operations.cache_clear()
    assert native.operations().functions
    assert {one: one.stat().st_mtime_ns for one in (tmp_path / "kernels").iterdir()} == made


def test_what_is_not_plain_memory_takes_the_reference() -> None:
    meta: Any = torch.empty(2, 3, device="meta")
    assert not native.serves(meta)
    assert rms_norm(meta, torch.zeros(3, device="meta"), 1e-6).shape == (2, 3)
    assert not native.serves(torch.zeros(2, dtype=torch.float64))
    assert not native.serves(torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16))


@built
@pytest.mark.parametrize("targets", [[600, 0], [-1, 0], [0]])
def test_a_label_that_is_no_token_is_refused(targets: list[int]) -> None:
    with pytest.raises(IndexError, match="a label is out of bounds of 512 tokens, or there is not one for each row"):
        head_rows(drawn(2, 512).float(), torch.tensor(targets), None, 30.0, with_grad=True)


@built
def test_labels_may_be_of_any_whole_dtype() -> None:
    found = [head_rows(drawn(2, 9).float(), torch.tensor([3, 8], dtype=kind), None, None, with_grad=False)[0]
             for kind in (torch.int64, torch.int32)]  # fmt: skip
    assert torch.equal(*found)


@built
@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (3, 1, 5, 8), (1, 1, 9, 8), (1, 2, 5, 8)])
def test_angles_of_another_shape_are_left_to_torch(shape: tuple[int, ...]) -> None:
    x, angle = drawn(2, 2, 5, 8).float(), drawn(*shape).float()
    try:
        expected = rotate_reference(x, angle, angle)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            rotate(x, angle, angle)
    else:
        assert torch.equal(rotate(x, angle, angle), expected)


@built
def test_what_torch_watches_takes_the_reference() -> None:
    x = drawn(4, 8).float()
    expected = geglu_reference(x, x)
    assert torch.allclose(torch.jit.trace(lambda one: geglu(one, one), (x,))(x * 1), expected)
    assert torch.allclose(make_fx(lambda one: geglu(one, one))(torch.zeros_like(x))(x), expected)
    assert torch.allclose(torch.func.vmap(lambda one: geglu(one, one))(x), expected)
    assert torch.func.grad(lambda one: geglu(one, one).sum())(x).shape == x.shape


@built
@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_a_damaged_library_is_built_again(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: None
) -> None:
    monkeypatch.setenv("GEMMA_FT_CACHE", str(tmp_path))
    assert native.operations().functions
    (library,) = (tmp_path / "kernels").glob("*.so")
    whole = library.read_bytes()
    library.unlink()  # as it is open in this process
    if damage != "gone":
        library.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    native.operations.cache_clear()
    assert native.operations().functions
    assert library.read_bytes()[:4] == b"\x7fELF"
    assert len(library.read_bytes()) > len(whole) // 2


def test_a_compiler_may_have_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "env g++ -g0")
    command = runtime.compiler()
    assert command is not None
    assert Path(command[0]).name == "env"
    assert command[1:] == ["g++", "-g0"]
    monkeypatch.setenv("CXX", "no-such-thing")
    assert (runtime.compiler() or ["none"])[0] != "no-such-thing"
