"""The operations in C++ against plain torch: values, gradients, rounding, layouts, and what happens without them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch.fx.experimental.proxy_tensor import make_fx

from gemma_ft.kernels import cpp_backend
from gemma_ft.kernels.cross_entropy import fused_cross_entropy
from gemma_ft.kernels.geglu import geglu, geglu_reference
from gemma_ft.kernels.nf4 import dequantize_nf4
from gemma_ft.kernels.rms_norm import rms_norm
from gemma_ft.kernels.rotary import rotate, rotate_reference
from gemma_ft.system import environment
from tests.kernels.test_operations import CASES, drawn, run

built = pytest.mark.skipif(not cpp_backend.operations().functions, reason=cpp_backend.operations().reason)
DTYPES = [torch.float32, torch.bfloat16]


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
    monkeypatch.setattr(cpp_backend, "call", None)
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
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operations are looked for again, and once more afterwards; where they are built, it is done in a hurry."""
    monkeypatch.setattr(cpp_backend, "FLAGS", tuple("-O0" if one == "-O3" else one for one in cpp_backend.FLAGS))
    cpp_backend.operations.cache_clear()
    yield
    cpp_backend.operations.cache_clear()


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
        assert cpp_backend.operations().reason == said
    elif cpp_backend.operations().reason != "plain torch: no C++ compiler; with g++ installed steps are faster":
        assert said[:60] in cpp_backend.operations().reason
    assert not cpp_backend.operations().functions
    assert not list(tmp_path.rglob("*.so"))
    op, reference, inputs = CASES["geglu"]
    for one, other in zip(run(op, inputs, torch.float32), run(reference, inputs, torch.float32), strict=True):
        assert torch.equal(one, other)


@built
def test_it_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: None) -> None:
    monkeypatch.setenv("GEMMA_FT_CACHE", str(tmp_path))
    assert cpp_backend.operations().functions
    made = {one: one.stat().st_mtime_ns for one in (tmp_path / "kernels").iterdir()}
    assert {one.suffix for one in made} == {".so", ".sha256"}
    cpp_backend.operations.cache_clear()
    assert cpp_backend.operations().functions
    assert {one: one.stat().st_mtime_ns for one in (tmp_path / "kernels").iterdir()} == made


def test_what_is_not_plain_memory_takes_the_reference() -> None:
    meta: Any = torch.empty(2, 3, device="meta")
    assert not cpp_backend.serves(meta)
    assert rms_norm(meta, torch.zeros(3, device="meta"), 1e-6).shape == (2, 3)
    assert not cpp_backend.serves(torch.zeros(2, dtype=torch.float64))
    assert not cpp_backend.serves(torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16))


@built
@pytest.mark.parametrize("targets", [[600, 0], [-1, 0], [0]])
def test_a_label_that_is_no_token_is_refused(targets: list[int]) -> None:
    with pytest.raises(IndexError, match="a label is out of bounds of 512 tokens, or there is not one for each row"):
        fused_cross_entropy(drawn(2, 512).float(), torch.tensor(targets), None, 30.0, with_grad=True)


@built
def test_labels_may_be_of_any_whole_dtype() -> None:
    found = [fused_cross_entropy(drawn(2, 9).float(), torch.tensor([3, 8], dtype=kind), None, None, with_grad=False)[0]
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
@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_a_damaged_library_is_built_again(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: None
) -> None:
    monkeypatch.setenv("GEMMA_FT_CACHE", str(tmp_path))
    assert cpp_backend.operations().functions
    (library,) = (tmp_path / "kernels").glob("*.so")
    whole = library.read_bytes()
    library.unlink()  # as it is open in this process
    if damage != "gone":
        library.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    cpp_backend.operations.cache_clear()
    assert cpp_backend.operations().functions
    assert library.read_bytes()[:4] == b"\x7fELF"
    assert len(library.read_bytes()) > len(whole) // 2


def test_a_compiler_may_have_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "env g++ -g0")
    command = environment.compiler()
    assert command is not None
    assert Path(command[0]).name == "env"
    assert command[1:] == ["g++", "-g0"]
    monkeypatch.setenv("CXX", "no-such-thing")
    assert (environment.compiler() or ["none"])[0] != "no-such-thing"
