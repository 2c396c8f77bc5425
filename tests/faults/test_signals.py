"""SIGTERM, Ctrl-C, SIGUSR1, SIGHUP and the stop file at any moment, on one rank and two: no step is lost."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_ft.system.files import fault_of
from tests.faults.conftest import FULL, Runs, outcome
from tests.forked import no_survivors

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def lost_steps(out: Path) -> int:
    """Steps that were computed and are in no checkpoint."""
    metrics = out / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    done = json.loads(lines[-1])["step"] if lines else 0
    saved = [
        int(path.name.removeprefix("step-"))
        for path in (out / "checkpoints").glob("step-????????")
        if fault_of(path) is None
    ]
    return done - max(saved, default=0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_loses_no_step(
    runs: Runs, reference: tuple[Any, bytes], figure: Callable[..., None], ranks: int
) -> None:
    """Only at its end is a checkpoint asked for: what is there after a signal, the signal made."""
    wanted, stopped, finished = (200 if FULL else 4), 0, 0
    moments = random.Random(ranks)
    long = ("checkpoint.every_steps=null", "eval.generate_rows=0")
    while stopped < wanted:
        out = runs.place()
        children = runs.start(out, *long, ranks=ranks, layout="fsdp2")
        with no_survivors(children):
            end = time.monotonic() + moments.uniform(0.2, 0.4 + 1.1 * ranks)
            while time.monotonic() < end and not all(child.ended() for child in children):
                time.sleep(0.005)
            number = moments.choice(SIGNALS)
            for child in children:  # as a launcher and a terminal do
                child.send(number)
            codes = [child.wait() for child in children]
        said = "".join(child.said for child in children)
        assert "Traceback" not in said, said
        assert set(codes) <= {0, 143}, (codes, said)
        if codes == [0] * ranks:
            finished += 1
        else:
            stopped += 1
            assert lost_steps(out) == 0, said
        codes, said = runs.go(out, *long, "--resume")
        assert codes == [0], said
        if ranks == 1:
            assert outcome(out) == reference
        shutil.rmtree(out, ignore_errors=True)
        figure(stopped=stopped, finished=finished, steps_lost=0)  # each time: a long suite may be cut short


def test_ranks_that_are_stopped_in_different_places_end_alike(runs: Runs) -> None:
    """One is in its first step, and waits; the other is not there yet, and leaves at once."""
    out = runs.place()

    def signalled() -> None:
        import os

        from gemma_ft.train import loop
        from gemma_ft.train.trainer import GemmaTrainer

        place, name = ((GemmaTrainer, "training_step"), (loop, "fit"))[int(os.environ["RANK"])]
        original = getattr(place, name)

        def then(*given: Any, **more: Any) -> Any:
            os.kill(os.getpid(), signal.SIGUSR1)
            return original(*given, **more)

        setattr(place, name, then)

    codes, said = runs.go(out, before=signalled, ranks=2, layout="fsdp2")
    assert codes == [143, 143], said
    assert "stopped by SIGUSR1 in step 1; --resume goes on" in said
    codes, said = runs.go(out, "--resume")
    assert codes == [0], said


def test_the_stop_file_stops(runs: Runs, reference: tuple[Any, bytes]) -> None:
    out = runs.place()
    stop = out.with_name("stop-here")
    stop.touch()
    codes, said = runs.go(out, "checkpoint.every_steps=null", "--stop-file", str(stop))
    assert codes == [143], said
    assert said.splitlines()[-1] == f"stopped by {stop} is there after step 1; --resume goes on from its checkpoint"
    stop.unlink()
    codes, said = runs.go(out, "checkpoint.every_steps=null", "--resume")
    assert codes == [0], said
    assert outcome(out) == reference


def test_a_signal_while_checkpoints_are_read_damages_none(runs: Runs, reference: tuple[Any, bytes]) -> None:
    """Whoever reads files takes some faults for damage: a signal must not be one of them."""
    out = runs.place()
    codes, said = runs.go(out)
    assert codes == [0], said
    (out / "summary.json").unlink()
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())

    def signalled() -> None:
        import os

        from gemma_ft.system import files

        original = files._fingerprint

        def fingerprint(path: Path) -> dict[str, Any]:
            os.kill(os.getpid(), signal.SIGTERM)
            return original(path)

        files._fingerprint = fingerprint

    codes, said = runs.go(out, "--resume", before=signalled)
    assert codes == [143], said
    assert said.splitlines()[-1] == "stopped by SIGTERM; nothing was lost, --resume goes on"
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == kept
    codes, said = runs.go(out, "--resume")
    assert codes == [0], said
    assert outcome(out) == reference
