"""What is known of how exported weights came to be: recipe, figures and certificate, as a run left them in files."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from gemma_ft.build.place import Place
from gemma_ft.recipe.run_files import RunFiles
from gemma_ft.recipe.schema import Recipe
from gemma_ft.recipe.validate import location_keys
from gemma_ft.system.redact import CREDENTIALS, LOCAL_FOLDERS, LOCAL_PATH, PERHAPS_A_TOKEN

# Keys of a recipe, of eval.json and of merge.json whose whole value may be a path, or several, with spaces and quotes.
PATH_KEYS = location_keys() | {"train", "eval", "rows", "folder", "name", "base"}


@dataclass(frozen=True)
class RunRecord:
    """The files of a run, each None where it is missing or cannot be read."""

    recipe: Recipe | None
    summary: dict[str, Any] | None
    evaluation: dict[str, Any] | None  # eval.json
    merge: dict[str, Any] | None  # merge.json


def read_record(place: Place) -> RunRecord:
    """The record of the run that an adapter or model folder lies in, or of the merged folder itself."""
    folder = place.adapter or (Path(place.base.name) if Path(place.base.name).is_absolute() else None)
    if folder is None:
        return RunRecord(None, None, None, None)
    run, merge = place.run, read_object(RunFiles(folder).certificate)
    if run is None:  # a folder that is no run's: nothing beside it belongs to it
        return RunRecord(None, None, None, merge)
    return RunRecord(place.recipe, read_object(run.summary), read_object(run.eval_results), merge)


def figures_by_model(results: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Model -> metric -> figure, of held-out rows and, as `task: metric`, of tasks."""
    figures = objects(results, "models")
    for model, tasks in objects(results, "tasks").items():
        for task, scores in tasks.items():
            for metric, figure in scores.items() if isinstance(scores, dict) else ():
                figures.setdefault(model, {})[f"{task}: {metric}"] = figure
    return figures


def objects(value: Any, key: str, *, only: type = dict) -> dict[str, Any]:
    """What lies under a key of a file, by name, as far as it is what was expected; {} where it is something else."""
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, dict):
        return {}
    return {str(name): child for name, child in found.items() if isinstance(child, only)}


def public(value: Any, key: str | None = None) -> Any:
    """A value of a recipe or contract without what only this machine knows: paths from the root, from home or from
    above shrink to their last name, and what looks like a secret is struck out. `key`: the one the value stands under;
    under those that name a path all of a text is one.
    """
    if isinstance(value, dict):
        return {name: public(entry, name) for name, entry in value.items()}
    if isinstance(value, list):
        return [public(entry, key) for entry in value]
    if not isinstance(value, str):
        return value
    text = CREDENTIALS.sub("", PERHAPS_A_TOKEN.sub("[secret]", value))
    if key in PATH_KEYS:
        text = _last_name(text) if _is_local(text) else LOCAL_FOLDERS.sub("", text)
    return LOCAL_PATH.sub(lambda path: _last_name(path[0]), text)


def _is_local(text: str) -> bool:
    """Whether a path says where it lies on this machine, rather than below where one stands."""
    rooted = Path(text).is_absolute() or PureWindowsPath(text).is_absolute()
    return rooted or text.startswith(("~", "file://")) or ".." in re.split(r"[/\\]", text)


def _last_name(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
