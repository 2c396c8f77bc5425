"""Where the figures also go when the recipe says so: Weights & Biases, TensorBoard. metrics.jsonl stays the truth."""

from __future__ import annotations

import math
import re
import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from gemma_ft.errors import first_line
from gemma_ft.recipe.schema import Recipe
from gemma_ft.system import environment
from gemma_ft.train.guard import ROOM, Guard

CONNECT_SECONDS = 10  # how long a dead endpoint is waited for, behind the guard: no step waits
CLOSE_SECONDS = 15  # how long the end of a run waits for a tracker
WANDB_FOLDER = re.compile(r"(?:offline-)?run-(\d{8}_\d{6})-([A-Za-z0-9_-]{1,64})")  # as W&B names those of its runs
Say = Callable[[str], None]


class Tracker(Protocol):
    """Takes figures and sampled answers by step, and an end."""

    def log(self, step: int, figures: dict[str, Any]) -> None: ...

    def samples(self, step: int, lines: Sequence[dict[str, Any]]) -> None: ...

    def close(self) -> None: ...


def build_trackers(recipe: Recipe, root: Path, say: Say, *, done: int = 0) -> list[Tracker]:
    """The trackers of a recipe's logging block, each behind a guard. `done`: steps of the run that a resume goes on
    after; the trackers go on there as well.
    """
    logging = recipe.logging
    trackers: list[Tracker] = []
    if logging.wandb != "disabled":
        trackers.append(GuardedTracker("W&B", partial(_start_wandb, recipe, root, say, done), say))
    if logging.tensorboard:
        trackers.append(GuardedTracker("TensorBoard", partial(_TensorBoard, root / "tensorboard", done), say))
    return trackers


class GuardedTracker:
    """A tracker that is started, fed and closed behind a guard: it can neither stop, hang nor end a run. What it does
    not take is told with `say`, once.

    A figure that is not there, for it was not finite, is NaN to it.
    """

    def __init__(self, name: str, start: Callable[[], Tracker], say: Say, *, room: int = ROOM) -> None:
        self.name, self._say = name, say
        self._tracker: Tracker | None = None
        self._guard = Guard(name, self._failed, room=room)
        self._behind = False
        self._guard.post(lambda: self._begin(start))

    def log(self, step: int, figures: dict[str, Any]) -> None:
        """Figures of a step."""
        numbers = {name: math.nan if value is None else value for name, value in figures.items()}
        self._post(lambda tracker: tracker.log(step, numbers))

    def samples(self, step: int, lines: Sequence[dict[str, Any]]) -> None:
        """Answers of a step."""
        self._post(lambda tracker: tracker.samples(step, lines))

    def close(self, seconds: float | None = None) -> None:
        """The end of the run, which waits so many seconds at most."""
        self._post(lambda tracker: tracker.close())
        limit = CLOSE_SECONDS if seconds is None else seconds
        if not self._guard.close(limit):
            self._say(f"{self.name} did not finish in {limit:g} s; metrics.jsonl has everything")

    def _begin(self, start: Callable[[], Tracker]) -> None:
        self._tracker = start()

    def _post(self, call: Callable[[Tracker], None]) -> None:
        def made() -> None:
            assert self._tracker is not None  # the first call of the guard made it, or was its last
            call(self._tracker)

        if not self._guard.post(made) and not self._behind:
            self._behind = True
            self._say(f"{self.name} is behind and misses figures; metrics.jsonl has them all")

    def _failed(self, error: BaseException) -> None:
        if self._tracker is None:
            self._say(f"{self.name}: {first_line(error)}; going on without it")
        else:
            self._say(f"{self.name} takes no more figures ({first_line(error, kind=True)}); metrics.jsonl has them all")


class _TensorBoard:
    """Event files. tensorboardX's own writer is not used: its queue is bounded, the thread behind it ends at the first
    fault of a write, and then add_scalar() and close() wait for ever.

    `done`: events after that step, in the files of a run that is resumed, are of steps that will be computed again;
    TensorBoard drops them. Source: tensorboardX 2.6 writer.py, purge_step.
    """

    def __init__(self, folder: Path, done: int = 0) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        before = len(list(folder.iterdir()))
        self._writer = EventsWriter(str(folder / "events"), filename_suffix=f".{before}" if before else "")
        if before:
            self._write(done + 1 if done else 0, session_log=SessionLog(status=SessionLog.START))

    def log(self, step: int, figures: dict[str, Any]) -> None:
        from tensorboardX.summary import scalar

        for name, value in figures.items():
            self._write(step, summary=scalar(name, value))
        self._writer.flush()

    def samples(self, step: int, lines: Sequence[dict[str, Any]]) -> None:
        from tensorboardX.summary import text

        for number, line in enumerate(lines, start=1):
            told = "\n".join(f"{key}: {line[key]}" for key in ("prompt", "expected", "answer"))
            quoted = "\n".join(f"    {part}" for part in told.splitlines())  # as code: no markdown in it is obeyed
            self._write(step, summary=text(f"sample {number}", quoted))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _write(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))


class _WandB:
    def __init__(self, run: Any) -> None:
        self.run = run

    def log(self, step: int, figures: dict[str, Any]) -> None:
        self.run.log(figures, step=step)

    def samples(self, step: int, lines: Sequence[dict[str, Any]]) -> None:
        import wandb

        if lines:
            keys = list(lines[0])
            table = wandb.Table(columns=[*keys], data=[[line[key] for key in keys] for line in lines])
            self.run.log({"samples": table}, step=step)

    def close(self) -> None:
        self.run.finish()


def _start_wandb(recipe: Recipe, root: Path, say: Say, done: int) -> _WandB:
    """A W&B run in the mode asked for; offline when the service does not answer in time. A run that is resumed goes on
    with its id. Raises: whatever wandb raises when even that fails.
    """
    import wandb

    environment.no_crash_reports()
    modes: tuple[Literal["online", "offline"], ...] = ("online", "offline")
    if recipe.logging.wandb == "offline":
        modes = ("offline",)
    for mode in modes:
        try:
            run = wandb.init(
                project=recipe.logging.project,
                name=recipe.logging.run_name or root.name,
                id=(_wandb_id(root / "wandb") if done else None) or secrets.token_hex(4),
                resume="allow",
                dir=str(root),
                config=recipe.model_dump(),
                mode=mode,
                settings=wandb.Settings(
                    init_timeout=CONNECT_SECONDS, finish_timeout=CONNECT_SECONDS, silent=True, console="off"
                ),
            )
            return _WandB(run)
        except Exception as error:  # no key, no network, a refused connection: each has its own class
            if mode == modes[-1]:
                raise
            say(f"W&B {mode}: {first_line(error)}; going on offline")
    raise AssertionError("a mode is returned, or raises")


def _wandb_id(folder: Path) -> str | None:
    """The id of the newest W&B run in a folder, out of the name that W&B gave to its folder."""
    found = [match for path in folder.glob("*run-*") if (match := WANDB_FOLDER.fullmatch(path.name))]
    return max(found, key=lambda match: match[1])[2] if found else None
