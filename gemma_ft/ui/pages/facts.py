"""What the files of a run say, read once, whatever state the run is in: finished, stopped, still going."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_ft.errors import RecipeError, UserError, first_line
from gemma_ft.recipe.load import load_recipe
from gemma_ft.recipe.objectives import KINDS
from gemma_ft.recipe.run_files import RunFiles
from gemma_ft.recipe.yaml_marks import read_yaml
from gemma_ft.system.row_kind import RowKind
from gemma_ft.system.units import is_figure

OF_STEPS = ("loss", "learning_rate", "grad_norm", "tokens_per_second")  # figures of metrics.jsonl
OF_OBJECTIVES = (  # figures of preferences, there and, with eval_ before them, in evals.jsonl
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/margins_per_token",
    "rewards/accuracies",
    "kl",
    "entropy",
    "lengths/chosen",
    "lengths/rejected",
    "logps/chosen",
    "logps/rejected",
)
Points = list[tuple[int, float]]  # (step, value), in the order of the steps


@dataclass(frozen=True)
class RunFacts:
    """One run as its files tell it. What is not there is empty or None."""

    files: RunFiles
    name: str
    recipe_text: str
    settings: dict[str, str]  # of the recipe by dotted key, each value in one line
    summary: dict[str, Any]
    curves: dict[str, Points]  # of metrics.jsonl
    evals: dict[str, Points]  # of evals.jsonl, with the scores before and after training
    samples: list[dict[str, Any]] = field(default_factory=list)
    eval_results: dict[str, Any] | None = None
    certificate: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)  # what a reader should know about these files

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.summary)

    @property
    def rows(self) -> RowKind:
        """What it learned from."""
        kind = KINDS.get(self.settings.get("objective.kind", ""))
        return kind.rows if kind is not None else "answers"

    def figure(self, *keys: str) -> Any:
        """A value of summary.json by its path of keys; None where it is not there."""
        found: Any = self.summary
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found


def read_run(root: Path) -> RunFacts:
    """The facts of the run in directory `root`.

    Raises: UserError when there is no run, or a file of it is damaged; a torn last line of a log is passed over.
    """
    files = RunFiles(root)
    if not files.recipe.is_file():
        raise UserError(f"{root}: holds no run: no recipe.yaml in it; name the output_dir of a training run")
    text = _text(files.recipe)
    read = read_yaml(text, files.recipe.name)
    if read.faults:
        raise UserError(f"{files.recipe}: is no YAML; restore it from the recipe that was run")
    summary = _object(files.summary) or {}
    notes = [] if summary else ["This run has not come to its end: figures are those so far."]
    settings = read.value
    try:
        settings = load_recipe(files.recipe).recipe.model_dump()
    except RecipeError as error:
        notes.append(f"{files.recipe.name} is shown as it is, for this version cannot read it: {first_line(error)}")
    results = _object(files.eval_results)
    if results is not None and summary and files.eval_results.stat().st_mtime < files.summary.stat().st_mtime:
        notes.append("eval.json is older than the end of this run: run gemma-ft eval again.")
    scored = {"eval_loss", "canary_loss", "canary_base_loss", *(f"eval_{name}" for name in OF_OBJECTIVES)}
    evals = _curves(files.evals, scored)
    return RunFacts(
        files=files,
        name=root.resolve().name,
        recipe_text=text,
        settings=_flat(settings),
        summary=summary,
        curves=_curves(files.metrics, {*OF_STEPS, *OF_OBJECTIVES}),
        evals=_with_ends(evals, summary),
        samples=[line for line in _lines(files.samples) if isinstance(line.get("prompt"), str)],
        eval_results=results,
        certificate=_certificate(files),
        notes=notes,
    )


def _with_ends(evals: dict[str, Points], summary: dict[str, Any]) -> dict[str, Points]:
    """The scores on the way, with those before and after training as first and last point."""
    before, after, last = summary.get("eval_before"), summary.get("eval_after"), summary.get("steps")
    ends = {
        **{f"eval_{name}": (_get(before, name), _get(after, name)) for name in ("loss", *OF_OBJECTIVES)},
        "canary_loss": (summary.get("canary_base_loss"), summary.get("canary_loss")),
        "canary_base_loss": (summary.get("canary_base_loss"), summary.get("canary_base_loss")),
    }
    found: dict[str, Points] = {}
    for name, (first, final) in ends.items():
        between = [point for point in evals.get(name, []) if point[0] != last]
        points: list[tuple[Any, Any]] = [(0, first), *between, (last, final)]
        found[name] = [(int(step), value) for step, value in points if is_figure(step) and is_figure(value)]
    return found


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _certificate(files: RunFiles) -> dict[str, Any] | None:
    """The certificate of the newest merge that lies in the run."""
    name = files.certificate.name
    found = [path for path in [files.certificate, *files.root.glob(f"*/{name}")] if path.is_file()]
    return _object(max(found, key=lambda path: (path.stat().st_mtime, str(path)))) if found else None


def _curves(path: Path, names: set[str]) -> dict[str, Points]:
    """The finite values of each name by step; lines are read one at a time and not kept."""
    curves: dict[str, Points] = {name: [] for name in names}
    for line in _lines(path):
        for name in names & line.keys():
            if is_figure(line[name]) and is_figure(line.get("step")):
                curves[name].append((int(line["step"]), float(line[name])))
    return curves


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines; what is no object is passed over: torn by a kill, it was never whole."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                yield line


def _object(path: Path) -> dict[str, Any] | None:
    """A JSON object, None where there is no such file. Raises: UserError for anything else."""
    if not path.is_file():
        return None
    try:
        found = json.loads(_text(path))
    except ValueError as error:
        raise UserError(f"{path}: is no JSON; write it again, or remove it") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object; write it again, or remove it")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted keys, each value in one line."""
    if isinstance(value, dict) and value:
        found: dict[str, str] = {}
        for name, child in value.items():
            found |= _flat(child, f"{prefix}.{name}" if prefix else str(name))
        return found
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return {prefix: " ".join(text.split())}
