"""What a run says of itself while it goes: lines of its files and figures of its trackers. A full disk ends no run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_ft.system.files import is_disk_full
from gemma_ft.train.run_dir import RunDir, append_line
from gemma_ft.train.trackers import Tracker


@dataclass
class RunLog:
    """Files and trackers of a run, on one of its ranks; `main`: the one that writes the files, and has the trackers.
    `say` hears what could not be written.
    """

    run: RunDir
    main: bool
    say: Callable[[str], None]
    trackers: list[Tracker] = field(default_factory=list)
    _unwritten: dict[Path, list[dict[str, Any]]] = field(default_factory=dict)  # lines that found no space yet

    def step(self, figures: dict[str, Any]) -> None:
        """An optimizer step, with all its figures."""
        if self.main:
            self._line(self.run.metrics, figures)
        for tracker in self.trackers:
            tracker.log(figures["step"], {key: value for key, value in figures.items() if key != "step"})

    def evaluation(self, step: int, figures: dict[str, float | None]) -> None:
        """An evaluation on the way."""
        if self.main:
            self._line(self.run.evals, {"step": step, **figures})
        self.scores(step, figures)

    def scores(self, step: int, figures: dict[str, float | None]) -> None:
        """What a model is scored by, for the trackers alone."""
        known = {f"eval_{name.removeprefix('eval_')}": value for name, value in figures.items() if value is not None}
        for tracker in self.trackers:
            tracker.log(step, known)

    def samples(self, step: int, lines: Sequence[dict[str, Any]]) -> None:
        """What the model answers at a step."""
        if self.main:
            with self._disk_may_be_full("samples.jsonl"):
                self.run.write_samples(step, list(lines))
        for tracker in self.trackers:
            tracker.samples(step, list(lines))

    def close(self) -> None:
        """The end of the run, however it came."""
        for tracker in self.trackers:
            tracker.close()

    def _line(self, path: Path, figures: dict[str, Any]) -> None:
        """Add a line, and those that found no space before it."""
        waiting = self._unwritten.setdefault(path, [])
        waiting.append(figures)
        with self._disk_may_be_full(path.name):
            while waiting:
                append_line(path, waiting[0])
                waiting.pop(0)

    @contextlib.contextmanager
    def _disk_may_be_full(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not is_disk_full(error):
                raise
            self.say(f"  no space left for {name}; free some: the run goes on")
