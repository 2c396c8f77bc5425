"""The formats that rows may have, by name. data is a stranger: the names are read off its files, none is imported."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

FOLDER = "gemma_ft.data.read.formats"  # a file for each format, called as the format is
PLACE = re.compile(r"^PLACE = (\d+)$", re.MULTILINE)  # in the order in which they are told; a file without one: last


def format_names() -> tuple[str, ...]:
    """The names, in the order in which they are told."""
    folder = find_spec(FOLDER)
    assert folder is not None, FOLDER
    found = []
    for path in folder.submodule_search_locations or ():
        for file in Path(path).glob("[!_]*.py"):
            place = PLACE.search(file.read_text(encoding="utf-8"))
            found.append((place is None, int(place[1]) if place else 0, file.stem))
    return tuple(name for *_, name in sorted(found))
