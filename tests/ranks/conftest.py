"""Runs on one and two CPU ranks (gloo), each rank a forked process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_ft.cli.app import main
from gemma_ft.train.run import train_recipe
from tests.forked import fork_ranks, no_survivors

ROOT = Path(__file__).resolve().parents[2]
ADD = """model.added_tokens=['"day":', '"minutes":']"""
CALM = "train.learning_rate=0.0005"  # at the recipe's a step or two leap, and rounding grows a hundredfold in them
STRATEGIES = {
    "lora": ["strategy=lora", "adapter.dropout=0.1", CALM],
    "qlora": ["quantize.double_quant=true", "adapter.dropout=0.1", CALM],
    "full": ["strategy=full", "train.learning_rate=0.0003"],
    "tokens": ["strategy=lora", ADD, "data.columns={weight: '{w}'}", CALM],
    "stream": ["strategy=lora", "data.streaming=true", "eval.overlap=allow", CALM],
    "full, tokens": ["strategy=full", ADD, "train.learning_rate=0.0003"],
}
Train = Callable[..., Path]
assert train_recipe is not None, "imported here, before the first fork"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.ranks)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-two conversations of unequal length: epochs of 22 do not go round in steps of 8, or on two ranks."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    found = (ROOT / "data" / "scheduling_train.jsonl").read_text().splitlines()[:22]
    lines = [json.dumps(json.loads(line) | {"w": 1 + number % 3}) for number, line in enumerate(found)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def arguments(rows: Path, out: Path, *more: str) -> list[str]:
    return [
        "train", str(ROOT / "recipes" / "sft_tiny.yaml"), f"output_dir={out}", f"data.train={rows}",
        f"data.eval={rows}", "eval.overlap=allow",
        "data.max_seq_len=96", "data.packing=false", "train.max_steps=8", "train.global_batch_size=8",
        "train.micro_batch_size=2", "eval.generate_rows=3", "eval.max_rows=5", "eval.every_steps=4", "eval.samples=2",
        "eval.max_new_tokens=12", "eval.batch_size=2", "checkpoint.every_steps=3", "checkpoint.keep=9",
        "adapter.rank=4", *more,
    ]  # fmt: skip


@pytest.fixture
def train(rows: Path, tmp_path: Path) -> Train:
    """Train on some ranks through the command line; returns the run's directory."""

    def go(name: str, *more: str, ranks: int = 1, layout: str = "ddp", code: int = 0) -> Path:
        out = tmp_path / name
        told = tmp_path / f"{name}-said"
        children = fork_ranks(ranks, lambda: main(arguments(rows, out, *more)), told, layout=layout)
        with no_survivors(children):
            codes = [child.wait() for child in children]
        assert codes == [code] * ranks, "\n".join(child.said for child in children)
        return out

    return go


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]
