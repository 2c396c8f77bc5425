"""The ranks of a run: how many there are, how they share the work, and what they tell each other.

Control messages (faults, stop requests) go over gloo, whatever the devices use for tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from gemma_ft.errors import RankError, UserError, first_line
from gemma_ft.system import environment, hardware
from gemma_ft.system.observer import SILENT
from gemma_ft.train.heartbeat import Heartbeat

Layout = Literal["one device", "ddp", "fsdp2"]
PATIENCE = timedelta(hours=2)  # of a collective; a rank that is gone is found by Heartbeat within seconds


@dataclass
class World:
    """One rank's view of all ranks. `mesh` is there where a launcher made ranks, also of a single one to be sharded."""

    rank: int = 0
    size: int = 1
    layout: Layout = "one device"
    reshard_after_forward: bool = True
    offload: bool = False
    writes: bool = True  # the first rank of its machine: it fills caches for the others
    mesh: DeviceMesh | None = None
    phase_name: str = "start"
    _heartbeat: Heartbeat | None = None
    _control: Any = field(default=None, repr=False)

    @property
    def main(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of the run that every rank comes to the end of: a fault of one rank is a fault of all, told once.

        Raises: what this rank raised; RankError where another did.
        """
        self.enter(name)
        error: Exception | None = None
        try:
            yield
        except Exception as one:
            error = one
        self.agree(error)

    def enter(self, name: str) -> None:
        """Note what this rank is doing, for those who find it silent."""
        self.phase_name = name
        if self._heartbeat is not None:
            self._heartbeat.phase = name

    def agree(self, error: Exception | None) -> None:
        """Raise `error`, or RankError with the first fault of another rank. Every rank calls it at the same place."""
        if self.size == 1 and error is None:
            return
        faults = self._faults(error)
        for rank, fault in enumerate(faults):
            if error is None and fault is not None:
                error = RankError(f"rank {rank}, in {self.phase_name}: {fault[0]}", exit_code=fault[1])
        if error is not None:
            error.told = not self.main  # type: ignore[attr-defined]  # rank 0 tells it
            raise error

    def _faults(self, error: Exception | None) -> list[tuple[str, int] | None]:
        """Every rank's fault, in words and exit code. One that has none may be in a collective and wait for one that
        has, which is therefore also told on a way of its own.
        """
        mine = None if error is None else (_said(error), int(getattr(error, "exit_code", 1)))
        if mine is None or self._heartbeat is None:
            return self.gather(mine)
        self._heartbeat.tell(mine[0])
        try:
            found = self.gather(mine)
        except RuntimeError:  # the others have gone
            return [mine]
        self._heartbeat.tell(None)
        return found

    def gather(self, value: Any) -> list[Any]:
        """What every rank has, by rank; small picklable values that are ours."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._control)
        return found

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        if self.size == 1:
            return flag
        found = torch.tensor([int(flag)])
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._control)
        return bool(found)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, in float64."""
        if self.size == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(found, group=self._control)
        return [float(value) for value in found]

    def of_first(self, numbers: list[int]) -> list[int]:
        """What rank 0 has, of lists of one length."""
        if self.size == 1:
            return numbers
        found = torch.tensor(numbers)
        dist.broadcast(found, src=0, group=self._control)
        return [int(number) for number in found]

    def close(self) -> None:
        """Leave the group; nothing is waited for."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
        if self.mesh is not None and dist.is_initialized():
            dist.destroy_process_group()


def join_world(warn: Callable[[str], None] = SILENT.warn) -> World:
    """The world that the launcher made of this process; one device without a launcher. `warn` is told why this rank
    leaves at once, where another is gone.

    Raises: UserError for an accelerate config that cannot be honoured.
    """
    launch = environment.launched()
    if launch.world_size == 1 and not launch.fsdp:
        return World()
    device = hardware.default_device()
    if device.type == "cuda":
        if launch.local_world_size > torch.cuda.device_count():
            raise UserError(
                f"{launch.local_world_size} processes on a machine with {torch.cuda.device_count()} GPUs; "
                f"use --nproc {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(device)
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))  # type: ignore[attr-defined]
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("ranks", store),  # type: ignore[attr-defined]
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=PATIENCE,
    )
    watch = Heartbeat(store, launch.rank, launch.world_size, warn)
    world = World(
        rank=launch.rank,
        size=launch.world_size,
        layout="fsdp2" if launch.fsdp else "ddp",
        reshard_after_forward=launch.reshard_after_forward,
        offload=launch.offload,
        writes=launch.local_rank == 0,
        mesh=init_device_mesh(device.type, (launch.world_size,)),
        _heartbeat=watch,
        _control=dist.new_group(backend="gloo", timeout=PATIENCE),
    )
    watch.start()
    return world


def lost_a_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because a rank at its other end is gone; gloo and NCCL say it in words alone."""
    text = str(error).lower()
    return any(
        word in text for word in ("connection closed by peer", "connection reset", "broken pipe", "ncclremoteerror")
    )


def _said(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    return first_line(error, kind=True)
