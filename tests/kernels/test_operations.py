"""The operations in C++ and in Triton (interpreted, where there is no GPU) against plain torch: values, gradients,
rounding, and what is no number.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical

from gemma_ft.kernels.backend import OPERATIONS
from gemma_ft.kernels.cross_entropy import fused_cross_entropy, fused_cross_entropy_reference
from gemma_ft.kernels.geglu import geglu, geglu_reference
from gemma_ft.kernels.rms_norm import rms_norm, rms_norm_reference
from gemma_ft.kernels.rotary import rotate, rotate_reference
from gemma_ft.kernels.triton.triton_backend import load
from gemma_ft.model.lm_head import softcapped
from tests.kernels.forced import force

DTYPES = [torch.float32, torch.bfloat16]
Op = Callable[..., Tensor]


def drawn(*shape: int, seed: int = 0, times: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * times


def angles(batch: int, tokens: int, width: int) -> tuple[Tensor, Tensor]:
    half = drawn(batch, 1, tokens, width // 2, seed=9, times=5.0).float()
    both = torch.cat((half, half), dim=-1)
    return both.cos(), both.sin()


def turned(op: Op) -> Op:
    return lambda x: op(x.transpose(1, 2), *(one.to(x.device) for one in angles(2, 9, 34)))


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


def run(
    op: Op, inputs: list[Tensor], dtype: torch.dtype, scale: float = 1.0, device: str = "cpu"
) -> list[Tensor]:  # fmt: skip
    """An operation's result and its gradients in float64, from inputs in `dtype`; a weight of one dimension is float32
    where the rest is bf16.
    """
    given = [
        one.detach().to(device, torch.float32 if one.dim() == 1 and dtype == torch.bfloat16 else dtype).requires_grad_()
        for one in inputs
    ]
    out = op(*given)
    upstream = drawn(*out.shape, seed=7).to(device, out.dtype) * scale
    return [one.cpu().double() for one in (out.detach(), *torch.autograd.grad(out, given, upstream))]


FAST = [one.name for one in OPERATIONS["rms_norm"] if one.name != "torch"]  # those of the other rows' operations too


@pytest.fixture(params=FAST, autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the operations run: those in C++ on the CPU, Triton's on a GPU, or by its interpreter as if it were one."""
    device = force(monkeypatch, request.param)
    if request.param == "triton":
        (kernel,) = (one for one in OPERATIONS["cross_entropy"] if one.name == "triton")
        monkeypatch.setattr(load(kernel.module), "BLOCK", 256)  # several to a row
    return device


def error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm().clamp(min=1e-30))


@pytest.mark.parametrize("name", CASES)
def test_in_float32_it_is_the_reference(name: str, device: str) -> None:
    op, reference, inputs = CASES[name]
    truth = run(reference, inputs, torch.float64) if name != "rotary" else run(reference, inputs, torch.float32)
    for found, expected in zip(run(op, inputs, torch.float32, device=device), truth, strict=True):
        assert error(found, expected) < 5e-7


@pytest.mark.parametrize("name", CASES)
def test_in_bf16_it_is_as_near_to_the_truth_as_the_reference(name: str, device: str) -> None:
    op, reference, inputs = CASES[name]
    rounded = [one.bfloat16().double() if one.dim() > 1 else one.float().double() for one in inputs]
    truth = run(reference, rounded, torch.float64 if name != "rotary" else torch.float32)
    found = run(op, rounded, torch.bfloat16, device=device)
    expected = run(reference, rounded, torch.bfloat16)
    for one, other, true in zip(found, expected, truth, strict=True):
        assert error(one, true) <= 1.05 * error(other, true)


@pytest.mark.parametrize("name", CASES)
def test_the_upstream_gradient_counts(name: str, device: str) -> None:
    op, _, inputs = CASES[name]
    whole = run(op, inputs, torch.float32, 1.0, device)
    for scale in (1.0, 0.25, 0.0):
        part = run(op, inputs, torch.float32, scale, device)
        for one, other in zip(whole[1:], part[1:], strict=True):
            assert torch.equal(one * scale, other), scale


def test_an_input_may_be_used_twice(device: str) -> None:
    both = [
        run(op, [drawn(4, 33)], torch.float32, device=device)
        for op in (lambda x: geglu(x, x) + x, lambda x: geglu_reference(x, x) + x)
    ]
    assert all(error(one, other) < 5e-7 for one, other in zip(*both, strict=True))


@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("cap", [None, 30.0, 15.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_head_is_the_reference(dtype: torch.dtype, cap: float | None, with_weights: bool, device: str) -> None:
    logits, targets = drawn(9, 1003, times=12.0).to(dtype), torch.arange(9) * 111
    targets[3] = logits[3].float().argmax()
    logits[4, 800] = logits[4, 700] = logits[4].max() + 9  # a tie: the first counts
    targets[4] = 700
    weights = drawn(9, seed=3).abs() if with_weights else None
    truth = fused_cross_entropy_reference(logits.double(), targets, weights, cap, with_grad=True)
    weights = None if weights is None else weights.to(device)
    options = (targets.to(device), weights, cap)
    found = fused_cross_entropy(logits.to(device, copy=True), *options, with_grad=True)
    assert error(found.losses.cpu().double(), truth.losses) < 1e-6
    assert found.correct.tolist() == truth.correct.tolist() == [at in (3, 4) for at in range(9)]
    predicted = Categorical(logits=softcapped(logits.double(), cap))
    assert error(truth.entropies, predicted.entropy()) < 1e-12
    assert error(found.entropies.cpu().double(), truth.entropies) < 2e-6
    assert found.gradient is not None
    assert truth.gradient is not None
    assert found.gradient.dtype == dtype
    assert error(found.gradient.cpu().double(), truth.gradient) < {torch.float32: 5e-6, torch.bfloat16: 4e-3}[dtype]
    assert fused_cross_entropy(logits.to(device, copy=True), *options, with_grad=False).gradient is None


@pytest.mark.parametrize("cap", [None, 30.0])
def test_what_is_no_number_is_seen_in_the_loss(cap: float | None, device: str) -> None:
    logits = drawn(2, 50).float().to(device)
    logits[1, 20] = float("nan")
    losses = fused_cross_entropy(logits.clone(), torch.tensor([3, 4], device=device), None, cap, with_grad=True).losses
    assert losses.isfinite().tolist() == [True, False]
    assert not rms_norm(logits, torch.zeros(50, device=device), 1e-6)[1].isfinite().any()
    assert not geglu(logits, logits)[1, 20].isfinite()


def test_a_label_that_is_none_is_seen_in_the_loss(device: str, request: pytest.FixtureRequest) -> None:
    """On a GPU nothing comes back in time to say so; on the CPU it is an error."""
    logits, targets = drawn(2, 50).float().to(device), torch.tensor([3, 50], device=device)
    if request.node.callspec.params["device"] == "cpp":
        with pytest.raises(IndexError):
            fused_cross_entropy(logits, targets, None, 30.0, with_grad=True)
    else:
        losses = fused_cross_entropy(logits, targets, None, 30.0, with_grad=True).losses
        assert losses.isfinite().tolist() == [True, False]
