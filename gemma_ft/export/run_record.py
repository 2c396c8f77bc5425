"""What is known of how exported weights came to be: recipe, figures and certificate, as a run left them in files."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gemma_ft.load import Place

SECRET = re.compile(r"\b(?:hf_|sk-|ghp_|wandb_)[A-Za-z0-9_-]{12,}")
# From the root, from home, from above, or from a drive; not the slashes inside an address or a relative path.
LOCAL_PATH = re.compile(r"(?<![\w:/.~])(?:~|\.\.|[A-Za-z]:)?[/\\][^\s;,'\"]+")


@dataclass(frozen=True)
class RunRecord:
    """The files of a run, each None where it is missing or cannot be read."""

    recipe: dict[str, Any] | None
    summary: dict[str, Any] | None
    evaluation: dict[str, Any] | None  # eval.json
    merge: dict[str, Any] | None  # merge.json


def read_record(place: Place) -> RunRecord:
    """The record of the run that an adapter or model folder lies in, or of the merged folder itself."""
    folder = place.adapter or (Path(place.base.name) if Path(place.base.name).is_absolute() else None)
    if folder is None:
        return RunRecord(None, None, None, None)
    run = folder.resolve().parent
    if not (run / "recipe.yaml").is_file():  # a folder that is no run's: nothing beside it belongs to it
        return RunRecord(None, None, None, _json(folder / "merge.json"))
    return RunRecord(
        _yaml(run / "recipe.yaml"), _json(run / "summary.json"), _json(run / "eval.json"), _json(folder / "merge.json")
    )


def public(value: Any) -> Any:
    """A value of a recipe or contract without what only this machine knows: paths from the root, from home or from
    above shrink to their last name, and what looks like a secret is struck out.
    """
    if isinstance(value, dict):
        return {key: public(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [public(entry) for entry in value]
    if not isinstance(value, str):
        return value
    return LOCAL_PATH.sub(lambda path: re.split(r"[/\\]", path[0].rstrip("/\\"))[-1], SECRET.sub("[secret]", value))


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _yaml(path: Path) -> dict[str, Any] | None:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return found if isinstance(found, dict) else None
