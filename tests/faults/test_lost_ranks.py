"""One rank of two killed, stopped or raising, wherever it is: the job ends within seconds and says which and where."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.conftest import FULL, Runs
from tests.forked import no_survivors

LIMIT = 60.0  # SILENT_SECONDS of the watch, and the start of two processes
PLACES = ("load", "step", "save", "eval")
HOOKS = {
    "load": ("gemma_ft.train.run", "build_model"),
    "step": ("gemma_ft.train.step", "micro_batch_loss"),
    "save": ("gemma_ft.train.checkpoint_state", "save_optimizer"),
    "eval": ("gemma_ft.train.trainer", "held_out_score"),
}


def fails(place: str, how: str) -> Callable[[], None]:
    """Have rank 1 of this job fail the second time it comes to a place (the first, in load)."""

    def install() -> None:
        if os.environ["RANK"] != "1":
            return
        import importlib

        module_name, name = HOOKS[place]
        owner: Any = importlib.import_module(module_name)
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        original, calls = getattr(owner, last), 0

        def replaced(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == (1 if place == "load" else 2):
                if how == "raise":
                    raise OSError(5, "Input/output error")
                os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
            return original(*args, **kwargs)

        setattr(owner, last, replaced)

    return install


CASES = [
    (place, how, layout)
    for place in PLACES
    for how in ("kill", "stop", "raise")
    for layout in ("ddp", "fsdp2")
    if FULL or how != "stop" or (place, layout) == ("step", "fsdp2")  # each waits for SILENT_SECONDS
]


@pytest.mark.parametrize(("place", "how", "layout"), CASES)
def test_the_job_ends_and_says_why(runs: Runs, figure: Callable[..., None], place: str, how: str, layout: str) -> None:
    out = runs.place()
    begun = time.monotonic()
    children = runs.start(
        out, "eval.every_steps=1", f"data.eval={runs.rows}", "eval.overlap=allow",
        "eval.generate_rows=0", "eval.samples=0",
        ranks=2, layout=layout, before=fails(place, how),
    )  # fmt: skip
    with no_survivors(children):
        code = children[0].wait(LIMIT)
        if how == "raise":
            assert children[1].wait(LIMIT) != 0
    seconds = time.monotonic() - begun
    said = children[0].said + children[1].said
    assert code not in (0, -signal.SIGKILL), said
    assert "Traceback" not in said, said
    assert "rank 1" in said or "another rank is gone" in said, said
    where = {"load": "the model", "step": "step", "save": "the save of step", "eval": "evaluation"}[place]
    assert where in said, said
    figure(seconds=round(seconds, 1), hang=False)


def test_ranks_that_would_say_different_things_say_what_rank_0_says(runs: Runs) -> None:
    """On unlike GPUs a tie may fall otherwise; a rank that stops earlier would leave the others waiting."""
    alone, out = runs.place(), runs.place()
    asked = ("eval.every_steps=3", "eval.samples=2", "eval.generate_rows=2", "eval.max_new_tokens=6")
    more = (f"data.eval={runs.rows}", "eval.overlap=allow", *asked)

    def otherwise() -> None:
        import torch

        from gemma_ft.infer import engine

        if os.environ["RANK"] == "1":
            engine.next_tokens = lambda logits, samplers: torch.full((len(samplers),), 1)  # <eos>, at once

    codes, said = runs.go(alone, *more)
    assert codes == [0], said
    codes, said = runs.go(out, *more, ranks=2, layout="fsdp2", before=otherwise)
    assert codes == [0, 0], said
    assert (out / "samples.jsonl").read_text() == (alone / "samples.jsonl").read_text()
