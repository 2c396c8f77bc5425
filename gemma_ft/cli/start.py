"""What the command line does before a verb imports anything that takes seconds: folders that cannot be used are
refused, and Python's garbage collector is kept from looking through what imports make.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from gemma_ft.recipe.schema import Recipe

OBJECTS_OF_A_START = 1_000_000  # of imports, a vocabulary and its merges


def collect_late() -> None:
    """Until a million objects were made, the collector does not run: what a start makes stays, and each of some fifty
    passes over it costs more than the last (a fifth of a start's CPU time). What is there by then is left out of later
    passes, which are as Python has them. A process that has begun already is left alone.
    """
    if "torch" in sys.modules or gc.get_freeze_count():
        return
    usual = gc.get_threshold()

    def leave_out(phase: Literal["start", "stop"], _: dict[str, Any]) -> None:
        if phase == "stop":
            gc.callbacks.remove(leave_out)
            gc.set_threshold(*usual)
            gc.freeze()

    gc.callbacks.append(leave_out)
    gc.set_threshold(OBJECTS_OF_A_START, *usual[1:])


def check_model(name: str, adapter: Path | None = None, *, instead: str | None = None, answers: bool = False) -> None:
    """Raises: UserError when what `name` or `adapter` stands for on this machine is of another family, or a file of
    weights, and says what to give `instead`; for a reward model where `answers` are wanted. What is not there, or
    damaged, is refused where it is opened.
    """
    from gemma_ft.build.located import is_reward, refuse_reward, refuse_weights
    from gemma_ft.model.config_file import check_family
    from gemma_ft.system.shipped import locate

    found = locate(name)
    if found is not None and found.is_file():
        refuse_weights(found, name, instead)
    for folder in filter(None, (found, adapter)):
        if answers and is_reward(folder):
            refuse_reward(name if folder is found else folder)
        for place in (folder, folder / "model"):
            check_family(place, name)
        for place in (folder, folder / "adapter"):
            base = locate(named) if (named := _base_of(place)) else None
            if base is not None:
                check_family(base, f"{place}/adapter_config.json: base model {base}")


def check_weights(recipe: Recipe) -> None:
    """Raises: UserError when what the recipe names as its weights lies on this machine, and is no model folder or not
    of its preset.
    """
    from gemma_ft.build.inputs import FRESH, weights_source
    from gemma_ft.families.records import PRESETS
    from gemma_ft.model.config_file import check_size
    from gemma_ft.system.shipped import locate

    name = recipe.model.weights or PRESETS[recipe.model.preset].weights
    if name != FRESH and locate(name) is not None:
        folder = weights_source(recipe).name
        check_size(Path(folder), recipe.model.preset, folder)


def _base_of(adapter: Path) -> str | None:
    """The base that the adapter_config.json of a folder names."""
    try:
        name = json.loads((adapter / "adapter_config.json").read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return name if isinstance(name, str) else None
