"""A disk that is full at any moment: the last good checkpoint stays, and with space the same run goes on."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemma_ft.system.files import fault_of
from tests.faults.conftest import FULL, Runs, outcome

SIZES = range(8_000, 400_000, 4_000) if FULL else (8_000, 30_000, 90_000)  # what a run says has to fit, too


def no_file_over(size: int) -> Callable[[], None]:
    def install() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return install


def full_at(place: Path, number: int) -> Callable[[], None]:
    """The `number`-th file that is opened for writing below `place`, and all later ones, find no space."""

    def install() -> None:
        seen = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes and str(place) in str(arguments[0]):
                seen += 1
                if seen >= number:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))

        sys.addaudithook(hook)

    return install


def goes_on(runs: Runs, out: Path, reference: tuple[Any, bytes]) -> None:
    for folder in (out / "checkpoints").glob("step-????????"):
        assert fault_of(folder) is None, f"{folder} is half written"
    codes, said = runs.go(out, "--resume")
    assert codes == [0], said
    assert outcome(out) == reference
    left = [path for path in out.rglob("*") if "staging" in path.name or "replaced" in path.name]
    assert left == []
    shutil.rmtree(out)


def test_files_that_cannot_grow(runs: Runs, reference: tuple[Any, bytes], figure: Callable[..., None]) -> None:
    for size in SIZES:
        out = runs.place()
        codes, said = runs.go(out, before=no_file_over(size))
        assert codes in ([4], [2], [0]), (size, codes, said)
        assert "Traceback" not in said
        assert "a fault of gemma-ft" not in said, said
        goes_on(runs, out, reference)
    figure(sizes=len(SIZES), failed_resumes=0)


def test_no_space_at_any_write(runs: Runs, reference: tuple[Any, bytes], figure: Callable[..., None]) -> None:
    number = refused = 0
    while True:
        number += 1 if FULL else 5
        out = runs.place()
        codes, said = runs.go(out, before=full_at(out, number))
        assert "Traceback" not in said
        assert "a fault of gemma-ft" not in said, (number, said)
        if codes == [0] and "no space" not in said.lower():
            break
        refused += 1
        assert codes in ([4], [2], [0]), (number, codes, said)
        goes_on(runs, out, reference)
    assert refused >= 4
    figure(writes=refused, failed_resumes=0)


def test_one_rank_that_finds_no_space_costs_both_a_checkpoint(runs: Runs) -> None:
    """Before anything of it is gathered: the other rank waits for nothing, the next interval saves again."""

    def no_space_once() -> None:
        from gemma_ft.system import files

        original, calls = files.check_space, 0

        def check_space(place: Path, bytes_needed: int, *, go_on: str) -> None:
            nonlocal calls
            calls += 1
            original(place, 10**18 if calls == 2 else bytes_needed, go_on=go_on)

        files.check_space = check_space

    out = runs.place()
    codes, said = runs.go(out, "checkpoint.keep=9", ranks=2, layout="fsdp2", before=no_space_once)
    assert codes == [0, 0], said
    told = said.replace("\n", "")
    assert "1e+09 GB are needed" in told
    assert "no checkpoint of step 2, the next interval tries again" in told
    saved = sorted(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").iterdir())
    assert saved == [1, 3, 4, 5, 6]


def test_a_disk_that_fills_up_within_a_save_costs_both_ranks_a_checkpoint(runs: Runs) -> None:
    """Rank 0 finds no space for the second file of a checkpoint; the other hears of it, and both go on."""

    def full_once() -> None:
        from gemma_ft.train import checkpoint_state

        original, calls = checkpoint_state.save_tensors, 0

        def save_tensors(path: Path, tensors: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 4:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            original(path, tensors)

        checkpoint_state.save_tensors = save_tensors

    out = runs.place()
    codes, said = runs.go(out, "checkpoint.keep=9", ranks=2, layout="fsdp2", before=full_once)
    assert codes == [0, 0], said
    assert "no checkpoint of step 2, the next interval tries again" in said.replace("\n", "")
    saved = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert saved == [f"step-0000000{step}" for step in (1, 3, 4, 5, 6)]
