"""Memory that runs out in the middle of a run: one process goes on with less, several end with a cure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.conftest import STEPS, Runs, instead_of_losses, outcome

PLAIN = ("adapter.dropout=0.0", "eval.generate_rows=0")  # dropout draws by micro-batch, which are others afterwards


def run_out(step: int, rows: int, where: str) -> Callable[[], None]:
    """From a step on (counted from 1), have more than so many rows run out of memory, forward or backward."""

    def install() -> None:
        import torch

        def full(*_: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        def loss(at: int, number: int, model: Any, inputs: Any, original: Callable[[], Any]) -> Any:
            short = at >= step and len(inputs["input_ids"]) > rows
            if short and where == "forward":
                full()
            found = original()
            if short and number == 2:  # the first micro-batch of the step has left its gradients
                found.loss.register_hook(full)
            return found

        instead_of_losses(loss)

    return install


def close(found: tuple[Any, bytes], expected: tuple[Any, bytes]) -> bool:
    """The same steps over the same tokens, figures and weights within the rounding of other sums."""
    import numpy
    from safetensors.numpy import load

    steps = [[line[i] for line in found[0]] for i in (0, 4)] == [[line[i] for line in expected[0]] for i in (0, 4)]
    figures = numpy.allclose([line[1:4] for line in found[0]], [line[1:4] for line in expected[0]], rtol=1e-5)
    one, other = load(found[1]), load(expected[1])
    return steps and figures and all(numpy.allclose(one[name], other[name], atol=1e-5) for name in other)


@pytest.mark.parametrize("every", [1, None], ids=["saved", "unsaved"])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("step", [1, 4])
def test_one_process_goes_on_with_half(runs: Runs, step: int, where: str, every: int | None) -> None:
    plain = runs.place()
    more = (*PLAIN, f"checkpoint.every_steps={every or 'null'}")
    codes, said = runs.go(plain, *more)
    assert codes == [0], said
    out = runs.place()
    codes, said = runs.go(out, *more, before=run_out(step, 1, where))
    assert codes == [0], said
    told = (
        f"memory ran out in step {step}; going on with all layers recomputing their activations, micro_batch_size 1 "
        "and 4 accumulations: the steps stay the same"
    )
    assert told in " ".join(said.split())
    assert close(outcome(out), outcome(plain))


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_several_ranks_end_with_a_cure(runs: Runs, layout: str) -> None:
    """They are in the same step and would wait for each other. The cure works."""
    out = runs.place()
    codes, said = runs.go(out, *PLAIN, before=run_out(4, 1, "forward"), ranks=2, layout=layout)
    assert codes == [2, 2], said
    assert "Traceback" not in said
    assert "out of GPU memory in step 4, micro-batches of 2 rows; --resume train.micro_batch_size=1 goes on, or" in said
    codes, said = runs.go(
        out, *PLAIN, "--resume", "train.micro_batch_size=1", before=run_out(4, 1, "forward"), ranks=2, layout=layout
    )
    assert codes == [0, 0], said
    assert [line[0] for line in outcome(out)[0]] == list(range(1, STEPS + 1))


def test_a_single_row_too_many_ends_with_a_cure(runs: Runs) -> None:
    out = runs.place()
    codes, said = runs.go(out, *PLAIN, before=run_out(3, 0, "forward"))
    assert codes == [2], said
    assert said.splitlines()[-1].startswith("out of GPU memory in step 3, micro-batches of 1 rows; set train.gradient_")
