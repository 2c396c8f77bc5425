"""`gemma-ft eval`: several models on the same held-out rows and tasks, side by side, with how sure each figure is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from gemma_ft.build.data import BuiltData, build_data, good_answers
from gemma_ft.errors import DiskError, UserError
from gemma_ft.evaluate import statistics
from gemma_ft.evaluate.harness import Tasks
from gemma_ft.evaluate.held_out import Question, Reply, answer_questions, questions_of
from gemma_ft.evaluate.metrics import METRICS, chosen, fitting
from gemma_ft.evaluate.models import BASE, ModelsToCompare, check_base, chosen_models, with_each
from gemma_ft.evaluate.perplexity import Pieces, check_window, loss_rows, piece_losses, pieces_of
from gemma_ft.evaluate.results import Measured, Scored, differences_of, estimates_of
from gemma_ft.evaluate.reward_work import RewardWork, reward_work
from gemma_ft.families.records import PRESETS
from gemma_ft.recipe.schema import Recipe
from gemma_ft.system import environment
from gemma_ft.system.files import as_json, replace_text
from gemma_ft.system.observer import SILENT, Job, Observer

SAMPLES_KEPT = 10


@dataclass(frozen=True)
class EvalOptions:
    """What a user asks of `gemma-ft eval` beyond the recipe; None leaves it to the recipe."""

    models: Sequence[str] | None = None
    rows: int | None = None
    batch_size: int | None = None
    metrics: Sequence[str] | None = None
    window: int | None = None
    stride: int | None = None
    tasks: Sequence[str] = ()
    task_path: Path | None = None
    task_limit: int | None = None
    task_chat: bool = False
    out: Path | None = None


@dataclass(frozen=True)
class Evaluation:
    """What was measured, as eval.json holds it, and the file that is to hold it (None: nobody asked for one)."""

    results: dict[str, Any]
    out: Path | None

    def write(self) -> None:
        """Write the file. Raises: DiskError."""
        if self.out is None:
            return
        try:
            replace_text(self.out, as_json(self.results))
        except OSError as error:
            raise DiskError(f"--out {self.out}: cannot be written: {error.strerror}; name another file") from error


def evaluate_models(compared: ModelsToCompare, options: EvalOptions, *, observer: Observer = SILENT) -> Evaluation:
    """Score the models that are compared. Nothing is written yet.

    A run's own eval.json is meant only for the whole run as it is: every model, every row, no other setting.

    Raises: UserError in one line.
    """
    _check_task_options(options)
    names = chosen_models(compared, options.models)
    as_it_is = (options.rows, options.models, options.metrics, options.window, options.stride) == (None,) * 5
    out = options.out or (compared.run.eval_results if compared.run is not None and as_it_is else None)
    if out is not None:
        _check_out(out)
    if BASE in names:
        check_base(compared)
    work = _prepare(compared, options, observer)
    measured: dict[str, Measured] = {}
    with observer.job("loading", len(names) * work.steps) as job:
        with_each(compared, names, lambda name, model: measured.update({name: work.measure(name, model, job)}))
    return Evaluation(work.results(measured), out)


def _check_out(out: Path) -> None:
    """Raises: UserError for a place that no file can be put in, before anything is measured for it."""
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: no such folder; make {out.parent} first")
    if out.is_dir() or out.is_symlink():
        raise UserError(f"--out {out}: is a {'link' if out.is_symlink() else 'folder'}; name a file")
    if not os.access(out.absolute().parent, os.W_OK):
        raise UserError(f"--out {out}: {out.parent} cannot be written to; name another file")


def _check_task_options(options: EvalOptions) -> None:
    """Raises: UserError for an option of tasks where there are none."""
    given = {"--task-path": options.task_path, "--task-limit": options.task_limit, "--task-chat": options.task_chat}
    for option, value in given.items():
        if value and not options.tasks:
            raise UserError(f"{option}: there are no tasks; name them with --tasks")


@dataclass(frozen=True)
class _Work:
    """Everything that is asked of each model, built once."""

    compared: ModelsToCompare
    settings: dict[str, Any]
    data: BuiltData
    tokenizer: PreTrainedTokenizerBase
    pieces: Pieces | None
    questions: list[Question]
    metrics: list[str]
    tasks: Tasks | None
    requests: int
    observer: Observer

    @property
    def steps(self) -> int:
        """What the progress bar counts for one model."""
        return (len(self.pieces.pieces) if self.pieces else 0) + len(self.questions) + self.requests

    def measure(self, name: str, model: Any, job: Job) -> Measured:
        """All figures and answers of one model."""
        found = Measured()
        encoder, batch_size = self.data.encoder, self.settings["batch_size"]
        if self.pieces is not None:
            job.phase(f"{name}: loss")
            losses = piece_losses(
                model,
                self.pieces.pieces,
                pad_id=encoder.control.pad,
                batch_size=batch_size,
                on_progress=job.advance,
            )
            rows = loss_rows(losses, self.pieces)
            found.scores["loss"] = Scored(rows, statistics.mean)
            found.scores["perplexity"] = Scored(rows, statistics.perplexity)
        if self.questions:
            job.phase(f"{name}: answers")
            found.replies = self._answers(model, job)
            references = [question.answer for question in self.questions]
            for metric in self.metrics:
                table = METRICS[metric]
                found.scores[metric] = Scored(table.rows(found.replies, references), table.figure)
        if self.tasks is not None:
            job.phase(f"{name}: tasks")
            tasks, cut = self.tasks.run(model, encoder, batch_size=batch_size, on_progress=job.advance)
            found.tasks = {
                task: {metric: Scored(one.rows, one.figure, one.value) for metric, one in figures.items()}
                for task, figures in tasks.items()
            }
            if cut:
                self.observer.say(f"{name}: {cut:,} task requests did not fit the context: cut at the left, behind BOS")
        return found

    def _answers(self, model: Any, job: Job) -> list[Reply]:
        """Answers to all questions, some batches at a time, so that the bar moves."""
        replies: list[Reply] = []
        step = 4 * self.settings["batch_size"]
        for start in range(0, len(self.questions), step):
            asked = self.questions[start : start + step]
            replies += answer_questions(
                model,
                self.tokenizer,
                asked,
                stop_ids=self.data.encoder.stop_ids,
                max_new_tokens=self.settings["max_new_tokens"],
                batch_size=self.settings["batch_size"],
            )
            job.advance(len(asked))
        return replies

    def results(self, measured: dict[str, Measured]) -> dict[str, Any]:
        """What eval.json holds."""
        samples = [
            {
                "prompt": question.prompt,
                "expected": question.answer,
                "answers": {name: one.replies[number].text for name, one in measured.items()},
            }
            for number, question in enumerate(self.questions[:SAMPLES_KEPT])
        ]
        return {
            "source": self.compared.source,
            "rows": self.pieces.stats.rows if self.pieces is not None else 0,
            "models": {name: estimates_of(one.scores) for name, one in measured.items()},
            "differences": differences_of(measured),
            "samples": samples,
            "tasks": {
                name: {task: estimates_of(figures) for task, figures in one.tasks.items()}
                for name, one in measured.items()
                if one.tasks
            },
            "settings": self.settings,
            "versions": environment.versions(),
        }


def _prepare(compared: ModelsToCompare, options: EvalOptions, observer: Observer) -> _Work | RewardWork:
    """Read rows and tasks, and say what is worth knowing about them. Raises: UserError."""
    recipe = _recipe(compared, options)
    tokenizer = compared.tokenizer()
    settings = _settings(compared, options, recipe)
    data = build_data(recipe, tokenizer, encoder=compared.encoder(tokenizer, recipe.data))
    if data.held_out is None and not options.tasks:
        raise UserError(
            f"{compared.source}: no held-out rows; set data.eval to a file of them"
            + ("" if recipe.data.streaming else ", or data.eval_fraction to a share of data.train such as 0.1")
        )
    settings["data"] = data.eval_source
    if compared.reward:
        of_answers = {"--metrics": options.metrics, "--window": options.window, "--stride": options.stride}
        of_answers |= {"--tasks": options.tasks}
        return reward_work(compared.source, data, settings, observer, options=of_answers)
    items = good_answers(data.held_out_items[: recipe.eval.max_rows])
    shape = {name: settings[name] for name in ("max_seq_len", "window", "stride")}
    pieces = pieces_of(items, data.encoder, **shape) if items else None
    questions, too_long = questions_of(
        data.held_out_items, data.encoder, max_seq_len=recipe.data.max_seq_len, limit=recipe.eval.generate_rows
    )
    references = [question.answer for question in questions]
    metrics = fitting(references) if options.metrics is None else chosen(options.metrics, references)
    tasks, requests = None, 0
    if options.tasks:
        tasks = Tasks(options.tasks, path=options.task_path, limit=options.task_limit, chat=options.task_chat)
        requests = tasks.requests(data.encoder, context=_context(recipe))
    for line in _about(data, pieces, questions, too_long, recipe):
        observer.say(line)
    return _Work(compared, settings, data, tokenizer, pieces, questions, metrics, tasks, requests, observer)


def _about(
    data: BuiltData, pieces: Pieces | None, questions: Sequence[Question], too_long: int, recipe: Recipe
) -> list[str]:
    """The rows that are scored, and what is worth knowing about them."""
    if pieces is None:
        return []
    lines = [f"held out: {data.eval_source}: {pieces.stats.rows:,} rows scored, {len(questions):,} answered"]
    if pieces.single_document:
        lines.append(
            f"  a single document, in {len(pieces.pieces):,} windows: these are resampled, and counted as rows"
        )
    lines += [f"  {line}" for line in pieces.stats.describe().splitlines()[2:]]  # what became of rows not scored whole
    if too_long:
        limit = recipe.data.max_seq_len
        lines.append(f"  {too_long:,} rows not answered: their question does not fit data.max_seq_len {limit}")
    if not questions and recipe.eval.generate_rows == 0:
        lines.append("  no answers are generated: eval.generate_rows is 0; --rows N asks for some")
    if data.overlap:
        lines.append(f"  {data.overlap:,} held-out rows are training rows too: their scores mean little")
    return lines


def _recipe(compared: ModelsToCompare, options: EvalOptions) -> Recipe:
    """The recipe with what the user asked for; questions are asked as in training, whatever it says today."""
    recipe = compared.recipe
    if options.rows is not None:
        limits = {"max_rows": options.rows, "generate_rows": options.rows}
        recipe = recipe.model_copy(update={"eval": recipe.eval.model_copy(update=limits)})
    if compared.contract is not None:
        told = recipe.data.model_copy(update={"system": compared.contract.system})
        recipe = recipe.model_copy(update={"data": told})
    return recipe


def _context(recipe: Recipe) -> int:
    return int(PRESETS[recipe.model.preset].config().max_position_embeddings)


def _settings(compared: ModelsToCompare, options: EvalOptions, recipe: Recipe) -> dict[str, Any]:
    """What decides the numbers, beside models and rows. Raises: UserError for windows that cannot be."""
    window = recipe.data.max_seq_len if options.window is None else options.window
    stride = max(1, window // 2) if options.stride is None else options.stride
    check_window(window, stride, max(_context(recipe), recipe.data.max_seq_len))
    return {
        "batch_size": options.batch_size or recipe.eval.batch_size,
        "max_rows": recipe.eval.max_rows,
        "generate_rows": recipe.eval.generate_rows,
        "max_new_tokens": recipe.eval.max_new_tokens,
        "max_seq_len": recipe.data.max_seq_len,
        "window": window,
        "stride": stride,
        "precision": recipe.train.precision,
        "quantize": compared.quantize[0],
        "system": recipe.data.system,
        "confidence": statistics.CONFIDENCE,
        "resamples": statistics.RESAMPLES,
        "task_limit": options.task_limit,
        "task_chat": options.task_chat,
    }
