"""Where things lie: a path as given from the current directory, else among the files that ship with the project."""

import os
from pathlib import Path

from gemma_ft.system.paths import PathText, expanded


def shipped_root() -> Path:
    """The folder that holds `recipes/` and `data/`: inside an installed package, or the top of a checkout."""
    package = Path(__file__).resolve().parent.parent
    packaged = package / "_shipped"
    return packaged if packaged.is_dir() else package.parent


def shipped_recipes() -> list[Path]:
    """The recipes a user can start, sorted by name; files that start with `_` are parents only."""
    return sorted(path for path in (shipped_root() / "recipes").glob("*.yaml") if not path.name.startswith("_"))


def shipped_launches() -> list[Path]:
    """The accelerate configs that ship with the project: where a run can be computed."""
    return sorted((shipped_root() / "accelerate_configs").glob("*.yaml"))


def locate(text: PathText) -> Path | None:
    """A file or folder as given (`~` is the home folder), relative to the current directory, then to the shipped files;
    None when not there.
    """
    text = expanded(text)
    # os.path.exists and not Path.exists: a name that no file system can hold is simply not there
    return Path(text) if os.path.exists(text) else _shipped(text)


def locate_recipe(text: PathText, beside: Path | None = None) -> Path | None:
    """The recipe file that `text` names: a path or a shipped name, `.yaml` may be left out; None when not there.

    `beside` is a folder looked in first: that of a recipe which extends `text`.
    """
    text = expanded(text)
    for name in (text, f"{text}.yaml"):
        in_recipes = _shipped(os.path.join("recipes", name))
        for place in (beside / name if beside else None, Path(name), _shipped(name), in_recipes):
            if place is not None and os.path.isfile(place):
                return place
    return None


def _shipped(text: PathText) -> Path | None:
    """A path below the shipped root, never one that leaves it by `..` or a link."""
    root = shipped_root()
    place = root / text
    return place if os.path.exists(place) and place.resolve().is_relative_to(root) else None
