"""Where the figures also go when the recipe says so: Weights & Biases, TensorBoard. metrics.jsonl stays the truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from gemma_ft import runtime
from gemma_ft.errors import first_line
from gemma_ft.recipe.schema import Recipe

CONNECT_SECONDS = 10  # a dead endpoint may delay the start by so much, and no step after it


class Tracker(Protocol):
    """Takes figures and sampled answers by step, and an end."""

    def log(self, step: int, figures: dict[str, Any]) -> None: ...

    def samples(self, step: int, lines: Sequence[dict[str, Any]]) -> None: ...

    def close(self) -> None: ...


def build_trackers(recipe: Recipe, root: Path, say: Callable[[str], None]) -> list[Tracker]:
    """The trackers of a recipe's logging block. One that cannot start is told with `say` and left out: no run dies of
    it.
    """
    logging = recipe.logging
    trackers: list[Tracker] = []
    if logging.wandb != "disabled":
        tracker = _start_wandb(recipe, root, say)
        trackers += [tracker] if tracker else []
    if logging.tensorboard:
        try:
            trackers.append(_TensorBoard(root / "tensorboard"))
        except (ImportError, OSError) as error:
            say(f"TensorBoard: {error}; going on without it")
    return trackers


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(folder))

    def log(self, step: int, figures: dict[str, Any]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def samples(self, step: int, lines: Sequence[dict[str, Any]]) -> None:
        for number, line in enumerate(lines, start=1):
            text = "\n".join(f"{key}: {line[key]}" for key in ("prompt", "expected", "answer"))
            quoted = "\n".join(f"    {part}" for part in text.splitlines())  # as code: no markdown in it is obeyed
            self.writer.add_text(f"sample {number}", quoted, step)

    def close(self) -> None:
        self.writer.close()


class _WandB:
    def __init__(self, run: Any, say: Callable[[str], None]) -> None:
        self.run, self.say = run, say

    def log(self, step: int, figures: dict[str, Any]) -> None:
        self._send(step, lambda: figures)

    def samples(self, step: int, lines: Sequence[dict[str, Any]]) -> None:
        def table() -> dict[str, Any]:
            import wandb

            keys = list(lines[0])
            return {"samples": wandb.Table(columns=[*keys], data=[[line[key] for key in keys] for line in lines])}

        if lines:
            self._send(step, table)

    def _send(self, step: int, figures: Callable[[], dict[str, Any]]) -> None:
        if self.run is None:
            return
        try:
            self.run.log(figures(), step=step)
        except Exception as error:  # whatever happens to W&B, the run goes on and metrics.jsonl has the figures
            self.say(f"W&B stopped taking figures ({type(error).__name__}); metrics.jsonl has them all")
            self.run = None

    def close(self) -> None:
        if self.run is None:
            return
        try:
            self.run.finish()
        except Exception as error:  # as above: never the end of a run
            self.say(f"W&B could not finish ({type(error).__name__}); metrics.jsonl has everything")


def _start_wandb(recipe: Recipe, root: Path, say: Callable[[str], None]) -> _WandB | None:
    """A W&B run in the mode asked for; offline when the service does not answer in time; None when even that fails."""
    try:
        import wandb
    except ImportError as error:
        say(f"W&B: {error}; going on without it")
        return None
    runtime.no_crash_reports()
    modes: tuple[Literal["online", "offline"], ...] = ("online", "offline")
    if recipe.logging.wandb == "offline":
        modes = ("offline",)
    for mode in modes:
        try:
            run = wandb.init(
                project=recipe.logging.project,
                name=recipe.logging.run_name or root.name,
                dir=str(root),
                config=recipe.model_dump(),
                mode=mode,
                settings=wandb.Settings(
                    init_timeout=CONNECT_SECONDS, finish_timeout=CONNECT_SECONDS, silent=True, console="off"
                ),
            )
            return _WandB(run, say)
        except Exception as error:  # no key, no network, a refused connection: each has its own class
            go_on = "; going on offline" if mode == "online" else "; going on without it"
            say(f"W&B {mode}: {first_line(error)}{go_on}")
    return None
