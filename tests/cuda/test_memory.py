"""Memory that runs out for real in the middle of a run: it goes on with less at a time, and the steps are the same.

On a CPU, where nothing runs out, the model says that it did.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_ft.recipe.load import LoadedRecipe
from gemma_ft.train import step as page
from gemma_ft.train.step import forward_backward
from tests.cuda.conftest import CUDA, ROWS

RecipeFor = Callable[..., LoadedRecipe]
Train = Callable[..., list[dict[str, Any]]]
STEP, MOST = 2, 16 if CUDA else 4


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """From STEP on, the next run has so many bytes of the device; on a CPU, half of the rows at most."""

    def limit(room: int) -> None:
        def limited_pass(parts: Any, batch: Any, divisor: Any) -> Any:
            if parts.step + 1 >= STEP:
                if not CUDA and len(batch["input_ids"]) > MOST // 2:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
                if CUDA:
                    torch.cuda.empty_cache()
                    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
            return forward_backward(parts, batch, divisor)

        monkeypatch.setattr(page, "forward_backward", limited_pass)

    yield limit
    unlimited()


def unlimited() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.set_per_process_memory_fraction(1.0)


def most_held(run: Callable[[], list[float]]) -> tuple[list[float], int, int]:
    """What it returns, and the most bytes of the device that were in use meanwhile, and that torch had taken."""
    gc.collect()
    if not CUDA:
        return run(), 0, 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return run(), torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def test_a_run_that_runs_out_goes_on_and_its_steps_are_the_same(
    recipe_for: RecipeFor, train: Train, limited: Callable[[int], None], tmp_path: Path
) -> None:
    def run(out: str, rows: int, checkpointing: str) -> list[float]:
        more = [f"train.global_batch_size={MOST}", f"train.micro_batch_size={rows}", f"train.max_steps={STEP + 1}",
                f"train.gradient_checkpointing={checkpointing}"]  # fmt: skip
        size = [f"data.train={ROWS}", "data.packing=true", "data.max_seq_len=1024"] if CUDA else []
        return [line["loss"] for line in train(recipe_for("strategy=lora", *more, *size, out=out))]

    expected, needed, _ = most_held(lambda: run("whole", MOST, "false"))
    _, _, enough = most_held(lambda: run("half", MOST // 2, "false")) if CUDA else (None, 0, 0)
    assert needed - enough > 64 * 2**20 or not CUDA, "too small to tell"
    limited((needed + enough) // 2)
    for checkpointing, told in (
        ("false", f"going on with micro_batch_size {MOST // 2} and 2 accumulations: the steps stay the same"),
        ("auto", "going on with all layers recomputing their activations, micro_batch_size "),
    ):
        unlimited()
        found = run(checkpointing, MOST, checkpointing)
        said = " ".join((tmp_path / "console.txt").read_text().split())
        assert f"memory ran out in step {STEP}; {told}" in said
        assert found == pytest.approx(expected, rel=1e-4)
        assert math.isfinite(found[-1])
