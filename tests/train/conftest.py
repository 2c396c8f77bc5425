"""A tiny Gemma 2 with amplified random weights, and runs over it that take about a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from gemma_ft.data.encode.tokenizer import load_tokenizer
from gemma_ft.data.encode.tokenizer_files import save_tokenizer
from gemma_ft.families.records import PRESETS
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.recipe.load import LoadedRecipe, load_recipe
from gemma_ft.system import environment
from gemma_ft.train.run import train_recipe
from gemma_ft.train.summary import TrainedRun
from gemma_ft.ui.progress import STEPS, ConsoleObserver
from gemma_ft.ui.training import show_summary, train_and_show

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    environment.quiet_libraries()


@pytest.fixture(scope="session")
def small_gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Gemma of the tiny preset's shape, amplified random weights and the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("small") / "gemma-small"
    tokenizer = load_tokenizer(str(ROOT / "data" / "gemma-tiny"))
    torch.manual_seed(7)
    config = PRESETS["gemma-tiny"].config(vocab_size=len(tokenizer))
    model = GemmaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.3 if "norm" in name else 1.5 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(str(folder))
    save_tokenizer(tokenizer, folder, system_policy="fold")
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten short conversations of unequal length."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        json.dumps(
            {
                "question": f"What is {n} plus {n}?" + " Please." * (n % 4),
                "answer": f"It is {2 * n}." + " Yes." * (n % 3),
            }
        )
        for n in range(10)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def recipe_for(small_gemma: Path, rows: Path, tmp_path: Path) -> Callable[..., LoadedRecipe]:
    """The shipped tiny recipe on the small model and rows, with further overrides."""

    def make(*overrides: str, out: str = "run") -> LoadedRecipe:
        return small_recipe(small_gemma, rows, tmp_path / out, *overrides)

    return make


def small_recipe(weights: Path, rows: Path, out: Path, *overrides: str) -> LoadedRecipe:
    """The shipped tiny recipe on a model and rows, short and without what is measured beside it."""
    return load_recipe(
        ROOT / "recipes" / "sft_tiny.yaml",
        [
            f"output_dir={out}",
            f"data.train={rows}",
            f"data.eval={rows}",
            "eval.overlap=allow",
            "data.max_seq_len=48",
            "data.packing=false",
            f"model.weights={weights}",
            "train.max_steps=4",
            "train.epochs=1",
            "train.global_batch_size=4",
            "train.micro_batch_size=2",
            "eval.generate_rows=0",
            "eval.every_steps=null",
            "eval.samples=0",
            "eval.canary=null",
            "checkpoint.every_steps=null",
            "adapter.rank=4",
            *overrides,
        ],
    )


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Run a recipe in this process, quietly; returns the lines of its metrics.jsonl. Its page, which costs as much as
    such a run does, is only made where `page` asks for it.
    """

    def run(
        loaded: LoadedRecipe, *, resume: bool = False, overwrite: bool = False, page: bool = False
    ) -> list[dict[str, Any]]:
        with (tmp_path / "console.txt").open("a", encoding="utf-8") as sink:
            console = Console(file=sink, width=120)
            if page:
                assert train_and_show(loaded, resume=resume, overwrite=overwrite, console=console) == 0
            else:
                observer = ConsoleObserver(console, line=STEPS, stays=True)
                show = partial(_shown_without_page, console)
                assert train_recipe(loaded, resume=resume, overwrite=overwrite, observer=observer, finish=show) == 0
        metrics = Path(loaded.recipe.output_dir) / "metrics.jsonl"
        return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]

    return run


def _shown_without_page(console: Console, trained: TrainedRun) -> None:
    show_summary(console, trained, None)
