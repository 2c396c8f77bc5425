"""SIGKILL, at every file operation of a run and at random moments: what goes on afterwards is the same run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.conftest import FULL, Runs, outcome
from tests.forked import no_survivors

CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def kill_at(place: Path, number: int) -> Callable[[], None]:
    """Have this process killed at the `number`-th change that it makes below `place`."""

    def install() -> None:
        seen = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event not in CHANGES or not isinstance(arguments[0], str | os.PathLike):
                return
            if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                return
            if str(place) in str(arguments[0]):
                seen += 1
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return install


def test_killed_at_any_change_of_a_file(runs: Runs, reference: tuple[Any, bytes], figure: Callable[..., None]) -> None:
    """Every opening for writing, renaming, making and removing below output_dir, one after the other."""
    killed = lost = 0
    number = 0
    while True:
        number += 1 if FULL else 7
        out = runs.place()
        codes, said = runs.go(out, before=kill_at(out, number))
        if codes == [0]:  # the run has fewer changes
            break
        assert codes == [-signal.SIGKILL], said
        killed += 1
        codes, said = runs.go(out, "--resume")
        lost += codes != [0] or outcome(out) != reference
        assert not lost, f"killed at change {number}: {said}"
        shutil.rmtree(out)
    assert killed >= (60 if FULL else 8)
    figure(killed=killed, failed_resumes=lost)


def test_killed_at_random_moments(runs: Runs, reference: tuple[Any, bytes], figure: Callable[..., None]) -> None:
    """Again and again until the run is through; each resume may be killed as well."""
    wanted, killed, trials = (1000, 0, 0) if FULL else (12, 0, 0)
    moments = random.Random(0)
    while killed < wanted:
        out = runs.place()
        trials += 1
        resume: tuple[str, ...] = ()
        for _ in range(60):
            children = runs.start(out, *resume)
            with no_survivors(children):
                end = time.monotonic() + moments.uniform(0.3, 2.0)
                while time.monotonic() < end and not children[0].ended():
                    time.sleep(0.005)
                children[0].send(signal.SIGKILL)
                code = children[0].wait()
            if code == 0:
                break
            assert code == -signal.SIGKILL, children[0].said
            killed += 1
            resume = ("--resume",)
        else:
            codes, said = runs.go(out, "--resume")
            assert codes == [0], said
        assert outcome(out) == reference, f"trial {trials}"
        shutil.rmtree(out)
        figure(killed=killed, runs=trials, failed_resumes=0)  # each time: a long suite may be cut short
