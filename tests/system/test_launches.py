"""benchmarks/launches.py: how many launches a layer's step takes on a GPU, bounded where there is none."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec

import pytest
import torch

from benchmarks.launches import FEWER, Launches, figures, model_of, of_a_layer, step
from gemma_ft.system import environment

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

# What the step of a layer of Gemma 2 issued when this was written. Not frozen: a change that issues fewer lowers the
# bound. One that issues more makes short steps slower on a GPU, where nothing else of the suite would show it:
# `python -m benchmarks.launches --where` names the lines.
MOST = {"lora": 93, "qlora": 107}
OF_STOCK = 0.35


@pytest.fixture(autouse=True)
def _quiet() -> None:
    environment.quiet_libraries()


@pytest.mark.parametrize("kind", MOST)
def test_a_step_issues_no_more_than_it_did(kind: str) -> None:
    ours, stock = (figures(of_a_layer("gemma-2-2b", kind, arm)) for arm in ("ours", "stock"))
    assert ours["forward"] + ours["backward"] == ours["total"] <= MOST[kind]
    assert ours["total"] < OF_STOCK * stock["total"]


def test_what_computes_or_copies_is_counted_forwards_and_backwards() -> None:
    x, weight, upstream = torch.ones(3, 4), torch.ones(4, 5, requires_grad=True), torch.ones(4, 3)
    with Launches() as count:
        found = (x @ weight).t()[1:].contiguous().relu()
        forward = names(count.taken())
        with count.instead("a kernel", 2):
            torch.ones(3).add_(1).mul_(2).sum()
        found.backward(upstream)
        backward = names(count.taken())
    assert forward == {"aten.mm": 1, "aten.clone": 1, "aten.relu": 1}
    assert backward == {"a kernel": 2, "aten.threshold_backward": 1, "aten.slice_backward": 2, "aten.mm": 1}


def names(found: Counter[tuple[str, str]]) -> Counter[str]:
    return Counter(name for name, _ in found.elements())


@pytest.mark.parametrize("name", ["gemma-2-2b", "gemma-2b"])
def test_what_stands_for_the_kernels_computes_what_they_do(name: str) -> None:
    model = model_of(name, "lora", FEWER, native=True, checkpointed=False)
    trained = [one for one in model.parameters() if one.requires_grad]
    plain, _ = step(model, native=False)  # a mode watches: neither C++ nor, on the CPU, Triton runs
    expected = [one.grad for one in trained]
    for one in trained:
        one.grad = None
    loss, counted = step(model, native=True)
    assert abs(float(loss) - float(plain)) < 1e-3 * float(plain)
    for one, true in zip(trained, expected, strict=True):
        assert one.grad is not None
        assert true is not None
        assert float((one.grad - true).norm()) < 0.03 * float(true.norm())  # bf16
    assert {"triton.rms_norm", "triton.rotary", "triton.geglu"} <= {one for one, _ in counted["backward"]}
