"""NaN in a loss, in gradients, in a weight: updates are left out and named, the run ends when they go on, nothing that
is not finite is saved.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import STEPS, Runs, instead_of_losses

NAN = float("nan")


def spoil(what: str, steps: set[int]) -> Callable[[], None]:
    """Make a number of some steps (counted from 1) NaN."""

    def install() -> None:
        now = 0

        def loss(step: int, number: int, model: Any, inputs: Any, original: Callable[[], Any]) -> Any:
            nonlocal now
            now = step
            if step in steps and what == "weight":
                next(p for p in model.parameters() if p.requires_grad).data.view(-1)[0] = NAN
            found = original()
            if step in steps and what == "loss":
                found.loss, found.value = found.loss * NAN, found.value * NAN
            if step in steps and what == "gradient":
                parameter = next(p for p in model.parameters() if p.requires_grad)
                parameter.register_hook(lambda grad: grad * (NAN if now in steps else 1.0))
            return found

        instead_of_losses(loss)

    return install


def finite_checkpoints(out: Path) -> bool:
    """Looked at byte for byte: this process makes no tensor."""
    import numpy
    from safetensors import safe_open

    for path in (out / "checkpoints").rglob("*.safetensors"):
        with safe_open(str(path), framework="numpy") as file:
            if not all(numpy.isfinite(file.get_tensor(name)).all() for name in file.keys()):  # noqa: SIM118
                return False
    return True


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_an_update_that_is_not_finite_is_left_out(runs: Runs, what: str, ranks: int) -> None:
    out = runs.place()
    codes, said = runs.go(out, before=spoil(what, {2, 3}), ranks=ranks, layout="fsdp2" if what == "loss" else "ddp")
    assert codes == [0] * ranks, said
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("skipped")] == [2, 3]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line["loss"] is not None for line in lines if not line.get("skipped"))
    assert f"over {runs.rows}:" in said.replace("\n", "")
    assert finite_checkpoints(out)


@pytest.mark.parametrize(("what", "steps"), [("loss", {2, 3, 4}), ("gradient", {2, 3, 4}), ("weight", {3})])
def test_a_run_that_stays_so_ends(runs: Runs, what: str, steps: set[int]) -> None:
    """Exit code 5; what was saved before is finite, and the run goes on from it."""
    out = runs.place()
    codes, said = runs.go(out, before=spoil(what, steps))
    assert codes == [5], said
    assert "Traceback" not in said
    assert finite_checkpoints(out)
    codes, said = runs.go(out, "--resume")
    assert codes == [0], said


def test_a_run_whose_first_updates_were_left_out_can_be_resumed(runs: Runs) -> None:
    """Its optimizer has no state yet."""
    out = runs.place()
    codes, said = runs.go(out, "train.max_steps=2", "train.schedule=constant", before=spoil("loss", {1, 2}))
    assert codes == [0], said
    codes, said = runs.go(out, "train.max_steps=4", "train.schedule=constant", "--resume")
    assert codes == [0], said
    assert finite_checkpoints(out)
