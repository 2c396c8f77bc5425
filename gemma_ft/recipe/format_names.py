"""The formats that rows may have, by name. data is a room above: the names are read off its files, none is imported."""

from __future__ import annotations

import re
from importlib import resources

FOLDER = "gemma_ft.data.read.formats"  # a file for each format, called as the format is
PLACE = re.compile(r"^PLACE = (\d+)$", re.MULTILINE)  # in the order in which they are told; a file without one: last


def format_names() -> tuple[str, ...]:
    """The names, in the order in which they are told."""
    found = []
    for file in resources.files(FOLDER).iterdir():
        if file.name.endswith(".py") and file.name != "__init__.py":
            place = PLACE.search(file.read_text(encoding="utf-8"))
            found.append((place is None, int(place[1]) if place else 0, file.name.removesuffix(".py")))
    return tuple(name for *_, name in sorted(found))
