"""Faults on purpose: runs of a second, forked, killed, damaged and starved; and what became of them.

GEMMA_FT_FAULTS=full takes the numbers of the published figures (`make faults`).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_ft.cli.app import main
from gemma_ft.train.run import train_recipe
from tests.forked import Child, fork_ranks, no_survivors

assert train_recipe is not None, "imported here, before the first fork"
ROOT = Path(__file__).resolve().parents[2]
FULL = os.environ.get("GEMMA_FT_FAULTS") == "full"
STEPS = 6
FIGURES = ROOT / "build" / "faults"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Keep what a test counted, under its name, for benchmarks/faults.py."""

    def keep(**counted: Any) -> None:
        FIGURES.mkdir(parents=True, exist_ok=True)
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        counted["commit"] = head.stdout.strip()
        (FIGURES / f"{request.node.name}.json").write_text(json.dumps(counted), encoding="utf-8")
        print(f"{request.node.name}: {json.dumps(counted)}")

    return keep


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        json.dumps({"question": f"What is {n} plus {n}?" + " Please." * (n % 4), "answer": f"It is {2 * n}."})
        for n in range(10)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


class Runs:
    """Starts runs of one short recipe."""

    def __init__(self, rows: Path, root: Path) -> None:
        self.rows, self.root = rows, root
        self.count = 0

    def words(self, out: Path, *more: str) -> list[str]:
        return [
            "train", str(ROOT / "recipes" / "sft_tiny.yaml"), f"output_dir={out}", f"data.train={self.rows}",
            "data.eval=null", "data.max_seq_len=48", "data.packing=false", f"train.max_steps={STEPS}",
            "train.global_batch_size=4", "train.micro_batch_size=2", "eval.canary=null", "checkpoint.every_steps=1",
            "checkpoint.keep=2", "adapter.rank=4", "adapter.dropout=0.1", *more,
        ]  # fmt: skip

    def place(self) -> Path:
        self.count += 1
        return self.root / f"run{self.count}"

    def start(
        self,
        out: Path,
        *more: str,
        ranks: int = 1,
        layout: str = "ddp",
        before: Callable[[], None] = lambda: None,
        environment: dict[str, str] | None = None,
    ) -> list[Child]:
        """Children that train; `before` is called in each of them first."""

        def work() -> int:
            before()
            return main(self.words(out, *more))

        said = out.with_name(f"{out.name}-said")
        return fork_ranks(ranks, work, said, layout=layout, environment=environment)

    def go(self, out: Path, *more: str, **how: Any) -> tuple[list[int], str]:
        """Exit codes, and all that was said."""
        children = self.start(out, *more, **how)
        with no_survivors(children):
            codes = [child.wait() for child in children]
        return codes, "".join(child.said for child in children)


@pytest.fixture(scope="session")
def runs(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(rows, tmp_path_factory.mktemp("runs"))


EXACT = ("step", "loss", "learning_rate", "grad_norm", "tokens")


def instead_of_losses(loss: Callable[[int, int, Any, Any, Callable[[], Any]], Any]) -> None:
    """Have `loss(step, number, model, inputs, original)` give what `micro_batch_loss` gives, of the so-manieth
    micro-batch of a step, both counted from 1, in this process.
    """
    from gemma_ft.train import step as page

    forward_backward, micro_batch_loss = page.forward_backward, page.micro_batch_loss
    current, number = None, 0  # parts of a step, also of one that begins anew

    def counted(parts: Any, *given: Any) -> Any:
        nonlocal current, number
        current, number = parts, number + 1 if parts is current else 1
        return forward_backward(parts, *given)

    def replaced(model: Any, inputs: Any, *given: Any) -> Any:
        return loss(current.step + 1, number, model, inputs, lambda: micro_batch_loss(model, inputs, *given))

    page.forward_backward, page.micro_batch_loss = counted, replaced


def outcome(run: Path) -> tuple[list[tuple[Any, ...]], bytes]:
    """What must be the same, bit for bit: the figures of each step, and the adapter."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[key] for key in EXACT) for line in lines], (
        run / "adapter/adapter_model.safetensors"
    ).read_bytes()


@pytest.fixture(scope="session")
def reference(runs: Runs) -> tuple[Any, bytes]:
    """The outcome of a run that nothing happened to."""
    out = runs.place()
    codes, said = runs.go(out)
    assert codes == [0], said
    return outcome(out)
