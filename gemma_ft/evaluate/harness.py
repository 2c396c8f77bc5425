"""Tasks of lm-evaluation-harness on a native model: its task files and metrics, our model behind its interface."""

from __future__ import annotations

import contextlib
import io
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.errors import UserError, first_line
from gemma_ft.evaluate.metrics import EXTRA
from gemma_ft.evaluate.statistics import Figure, Floats, mean, perplexity
from gemma_ft.system.hub import ask_or_go_offline

# The harness's own seeds, in the order of lm_eval.simple_evaluate: random, numpy, torch, few-shot examples.
SEEDS = (0, 1234, 1234, 1234)


@dataclass(frozen=True)
class TaskFigure:
    """A metric of a task: its value, and rows [N, K] with the figure that gives it, where it is one of sums over rows
    (then it can be resampled), else None.
    """

    value: float
    rows: Floats | None
    figure: Figure


class Tasks:
    """Tasks of the harness, loaded once and run on one model after the other.

    `names`: of tasks, groups or tags, those in the folder `path` first. `limit`: rows of each. `chat`: put questions in
    the chat template. Raises: UserError without the package, and for a task that cannot be loaded.
    """

    def __init__(self, names: Sequence[str], *, path: Path | None, limit: int | None, chat: bool) -> None:
        self.limit, self.chat = limit, chat
        _require()
        if path is not None and not path.is_dir():
            raise UserError(f"--task-path: {path}: no such folder; give one that holds task files (.yaml)")
        random.seed(SEEDS[0])
        np.random.seed(SEEDS[1])
        torch.manual_seed(SEEDS[2])
        with _quietly():
            self._loaded = _load(names, path)
        self._drawn = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self.names = list(self._loaded["tasks"])

    def _draw_again(self) -> None:
        """Put every generator of random numbers to where `lm_eval.simple_evaluate` has it when it builds its requests.

        A task draws few-shot examples, and whatever its own functions draw, each time its requests are built: once to
        count them, and once for each model. All are to see the same, which are the harness's own.
        """
        ours, arrays, tensors = self._drawn
        random.setstate(ours)
        np.random.set_state(arrays)
        torch.set_rng_state(tensors)
        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(seed=SEEDS[3])

    def requests(self, encoder: ChatEncoder, *, context: int) -> int:
        """How many requests the tasks make of one model that reads `context` tokens.

        Raises: UserError when a task's template does not fit its rows, or it wants answers that the engine cannot give.
        """
        lm = _model()(None, encoder, batch_size=1, max_length=context)
        total = 0
        self._draw_again()
        for name, task in self._loaded["tasks"].items():
            try:
                with _quietly():
                    task.build_all_requests(
                        limit=self.limit,
                        apply_chat_template=self.chat,
                        fewshot_as_multiturn=self.chat,
                        chat_template=lm.apply_chat_template if self.chat else None,
                        tokenizer_name=lm.tokenizer_name if self.chat else "",
                    )
            except UserError:
                raise
            except Exception as error:  # templates and functions of a task raise anything
                raise UserError(
                    f"--tasks: {name}: its requests cannot be made: {first_line(error, kind=True)}"
                ) from error
            _check_options(lm, name, task.instances)
            total += sum(instance.repeats for instance in task.instances)
        return total

    def run(
        self, model: Any, encoder: ChatEncoder, *, batch_size: int, on_progress: Callable[[int], None]
    ) -> tuple[dict[str, dict[str, TaskFigure]], int]:
        """Task -> metric -> figure, and how many requests were cut to fit the context. Metrics of a filter other than
        "none" carry its name: "exact_match,strict-match".
        """
        from lm_eval.evaluator import evaluate

        lm = _model()(model, encoder, batch_size=batch_size, on_progress=on_progress)
        self._draw_again()
        with _quietly():
            found = evaluate(
                lm=lm,
                task_dict=self._loaded,
                limit=self.limit,
                bootstrap_iters=0,  # the harness starts a pool of processes for it; ours come with every figure
                log_samples=True,
                apply_chat_template=self.chat,
                fewshot_as_multiturn=self.chat,
            )
        samples = found.get("samples", {})
        figures = {
            name: {
                key.removesuffix(",none"): _figure_of(value, key, samples.get(name, []))
                for key, value in results.items()
                if "," in key and "_stderr," not in key and isinstance(value, int | float)
            }
            for name, results in found["results"].items()
        }
        return {name: one for name, one in figures.items() if one}, lm.truncated


def _check_options(lm: Any, name: str, instances: Sequence[Any]) -> None:
    """Raises: UserError naming the task whose answers are asked for with options that cannot be."""
    for instance in instances:
        if instance.request_type != "generate_until":
            continue
        try:
            lm.options_of(instance.args[1])
        except UserError as error:
            raise UserError(f"--tasks: {name}: {str(error).removeprefix('--tasks: ')}") from error
        except (TypeError, ValueError) as error:  # the harness makes numbers of what stands there
            raise UserError(
                f"--tasks: {name}: generation_kwargs: {first_line(error, kind=True)}; mend them in the task"
            ) from error


def _figure_of(value: float, key: str, samples: Sequence[dict[str, Any]]) -> TaskFigure:
    """A result with its rows, when the harness's value can be had from sums over them: a mean, or a perplexity of
    (log probability, weight) pairs.
    """
    metric, _, kind = key.partition(",")
    values = [sample[metric] for sample in samples if sample["filter"] == kind and metric in sample]
    candidates: list[tuple[Floats, Figure]] = []
    with contextlib.suppress(ValueError, TypeError):
        found = np.array(values, dtype=float)
        if found.ndim == 1 and len(found):
            candidates = [(np.stack([found, np.ones(len(found))], axis=1), mean)]
        elif found.ndim == 2 and found.shape[1] == 2:
            candidates = [(found * [-1, 1], perplexity), (found * [-1 / np.log(2), 1], mean)]
    for rows, figure in candidates:
        if isclose(float(figure(rows.sum(axis=0)[None])[0]), value, rel_tol=1e-9, abs_tol=1e-12):
            return TaskFigure(float(value), rows, figure)
    return TaskFigure(float(value), None, mean)


def _require() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(f"--tasks: lm-evaluation-harness is not installed; {EXTRA}") from error


def _model() -> Any:
    from gemma_ft.evaluate.harness_model import NativeLM

    return NativeLM


def _load(names: Sequence[str], path: Path | None) -> dict[str, Any]:
    """The harness's task objects, with its own defaults filled in. Its list of tasks takes seconds to read: it is left
    alone when the folder has all that is asked for.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=path and str(path), include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=path and str(path))
    for name in names:
        if name not in manager.all_tasks:
            where = f" in {path}, nor" if path is not None else ""
            raise UserError(f"--tasks: {name}: no such task{where} in the harness; `lm-eval ls tasks` lists its own")
    try:
        ask_or_go_offline()
        loaded: dict[str, Any] = manager.load(list(names))
    except Exception as error:  # a task file, the data it names and the hub behind it raise anything
        raise UserError(f"--tasks: {', '.join(names)}: cannot be loaded: {first_line(error, kind=True)}") from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"--tasks: {name}: runs code that a model wrote; use lm-eval itself, in a sandbox")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keeps the progress bars and log lines that the harness and `datasets` write to stderr away from ours."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(before)
