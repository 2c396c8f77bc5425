"""docs/numerics.md names tests and code that exist."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "numerics.md"


def named_tests() -> list[tuple[str, str]]:
    """(file, test or pattern) of every reference in backticks; an ellipsis stands for the file named before it."""
    found, file = [], ""
    for path, test in re.findall(r"`([\w/]+\.py|…)(?:::([\w*]+))?`", PAGE.read_text(encoding="utf-8")):
        if "/test_" in path or path == "…":
            file = file if path == "…" else path
            found.append((file, test or "test_*"))
    return found


def test_every_test_named_on_the_page_exists() -> None:
    references = named_tests()
    assert len(references) > 50
    missing = []
    for file, pattern in references:
        source = ROOT / "tests" / file
        names = re.findall(r"^def (test_\w+)", source.read_text(encoding="utf-8"), re.M) if source.is_file() else []
        if not any(fnmatch(name, pattern) for name in names):
            missing.append(f"{file}::{pattern}")
    assert not missing


def test_every_line_of_code_named_on_the_page_exists() -> None:
    text = PAGE.read_text(encoding="utf-8").split("## Against transformers")[0]
    rows = [line.split("|")[2] for line in text.splitlines() if line.startswith("|") and ".py`" in line]
    assert len(rows) > 10
    for cell in rows:
        file = ""
        for name in re.findall(r"`([\w./]+)`", cell):
            if name.endswith(".py"):
                file = (ROOT / "gemma_ft" / "model" / name).read_text(encoding="utf-8")
                continue
            for part in name.split("."):
                assert re.search(rf"^\s*(def|class) {part}\b|^{part}\b", file, re.M), (cell, name)
