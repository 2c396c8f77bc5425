"""Work in processes of its own, forked from one that has imported the libraries and done nothing with them: imports
take seconds, a fork does not. Everything that makes a tensor or a thread belongs into the children.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 120.0


@dataclass
class Child:
    """A forked process: what it printed, and how it ended (negative: by that signal)."""

    pid: int
    output: Path
    code: int | None = None

    @property
    def said(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def ended(self) -> bool:
        """Whether it has ended; does not wait."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit code. Raises: AssertionError after so many seconds; it is killed then."""
        end = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"process {self.pid} did not end in {seconds:.0f} s; it said:\n{self.said}")
            time.sleep(0.01)
        assert self.code is not None
        return self.code


def fork(work: Callable[[], int | None], output: Path, environment: Mapping[str, str] | None = None) -> Child:
    """Run `work` in a child whose stdout and stderr go to `output`; its result is the exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Child(pid, output)
    code = 70
    try:
        os.environ.update(environment or {})
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        code = work() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def fork_ranks(
    count: int,
    work: Callable[[], int | None],
    folder: Path,
    *,
    layout: str,
    environment: Mapping[str, str] | None = None,
) -> list[Child]:
    """Run `work` on `count` ranks, as a launcher would start them on one machine; outputs are `folder`/rank<N>.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    children = []
    for rank in range(count):
        told = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            **({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if layout == "fsdp2" else {}),
            **(environment or {}),
        }  # fmt: skip
        children.append(fork(work, folder / f"rank{rank}.txt", told if count > 1 else environment))
    return children


@contextlib.contextmanager
def no_survivors(children: list[Child]) -> Iterator[None]:
    """Whatever happens, none of them is left."""
    try:
        yield
    finally:
        for child in children:
            if not child.ended():
                child.send(signal.SIGCONT)
                child.send(signal.SIGKILL)
                child.wait(10)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
