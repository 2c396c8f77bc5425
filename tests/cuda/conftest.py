"""What runs on CUDA where there is a device (`make test-gpu`), and elsewhere on the CPU, which proves the tests' code.

Products are the same on both, sums are not in the same order: what is equal to the bit on a CPU is near on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from gemma_ft.kernels import cpp_backend, flex_attention, matmul
from gemma_ft.kernels.triton import triton_backend
from gemma_ft.recipe.load import LoadedRecipe, load_recipe
from gemma_ft.system import environment
from gemma_ft.train.run import train_recipe
from gemma_ft.ui.progress import STEPS, ConsoleObserver

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"
ROWS = ROOT / "data" / "scheduling_train.jsonl"
PROBED = (
    cpp_backend.operations, triton_backend.reason_against, flex_attention.reason_against, flex_attention.fitting,
    matmul.widens,
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a CPU they prove their own code alone, in minutes: make test-slow."""
    for item in items:
        if not CUDA and item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    environment.quiet_libraries()


@contextmanager
def kernels(monkeypatch: pytest.MonkeyPatch, setting: str) -> Iterator[None]:
    """With GEMMA_FT_KERNELS set to that: what was found out without it is forgotten, and again afterwards."""
    try:
        with monkeypatch.context() as changed:
            changed.setenv("GEMMA_FT_KERNELS", setting)
            for probe in PROBED:
                probe.cache_clear()
            yield
    finally:
        for probe in PROBED:
            probe.cache_clear()


def same(found: dict[str, Tensor], expected: dict[str, Tensor], near: float) -> bool:
    """Equal to the bit on a CPU, `near` by its norm on a GPU."""
    assert found.keys() == expected.keys()
    if CUDA:
        return all(float((found[name] - one).norm()) <= near * float(one.norm()) for name, one in expected.items())
    return all(torch.equal(found[name], one) for name, one in expected.items())


@pytest.fixture
def recipe_for(tmp_path: Path) -> Callable[..., LoadedRecipe]:
    """The recipe of the tiny Gemma that ships, on some of its rows, for a few steps and with nothing scored."""

    def make(*overrides: str, out: str = "run") -> LoadedRecipe:
        return load_recipe(
            ROOT / "recipes" / "sft_tiny.yaml",
            [
                f"output_dir={tmp_path / out}", f"data.train={{path: {ROWS}, max_rows: 40}}", "data.eval=null",
                "data.max_seq_len=150", "data.packing=false", "train.max_steps=4", "train.learning_rate=0.0005",
                "train.micro_batch_size=2", "eval.canary=null", "eval.generate_rows=0", "eval.samples=0",
                "checkpoint.every_steps=null", *overrides,
            ],
        )  # fmt: skip

    return make


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Run a recipe in this process; returns the lines of its metrics.jsonl. What was said goes to console.txt."""

    def run(loaded: LoadedRecipe, *, resume: bool = False) -> list[dict[str, Any]]:
        with (tmp_path / "console.txt").open("a", encoding="utf-8") as sink:
            observer = ConsoleObserver(Console(file=sink, width=200), line=STEPS)
            assert train_recipe(loaded, resume=resume, observer=observer) == 0  # no page: half of a short run's time
        return metrics(loaded)

    return run


def metrics(loaded: LoadedRecipe) -> list[dict[str, Any]]:
    path = Path(loaded.recipe.output_dir) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
