"""The worked examples of docs/extending.md, and how they are done in a copy of the package.

Above each block of the page stands where it goes: `<!-- NAME: PATH -->` for a new file; `<!-- NAME: PATH, before
"TEXT" -->` for lines that are put in front of the one line that begins with TEXT, with `instead of` in its place. An
example may have several blocks, of one name. What is Python by itself is in a block of `python`, which ruff formats;
other lines are in one of `text`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "extending.md"
BLOCK = re.compile(
    r'^<!-- (\w+): ([\w./]+)(?:, (before|instead of) "([^\n]+)")? -->\n```(?:python|text)\n(.*?)^```', re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """Lines for a file of the project: a new one, or put `before` or `instead of` the line that begins with `line`."""

    example: str
    path: str
    how: str
    line: str
    code: str

    def put(self, root: Path) -> None:
        """Do it in a copy of the project."""
        file = root / self.path
        if not self.how:
            assert not file.exists(), f"{self.path} is there already"
            file.write_text(self.code, encoding="utf-8")
            return
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        (place,) = [number for number, line in enumerate(lines) if line.startswith(self.line)]
        lines[place : place + (self.how == "instead of")] = [self.code]
        file.write_text("".join(lines), encoding="utf-8")


def blocks() -> list[Block]:
    """All blocks of the page, in its order."""
    return [Block(*found) for found in BLOCK.findall(PAGE.read_text(encoding="utf-8"))]


def blocks_of(example: str) -> list[Block]:
    """The blocks of one example."""
    return [block for block in blocks() if block.example == example]


def files_of(example: str) -> set[str]:
    """The files that an example touches."""
    return {block.path for block in blocks_of(example)}


def copied(folder: Path) -> Path:
    """A copy of what runs, without what was made of it."""
    for name in ("gemma_ft", "recipes", "accelerate_configs", "data"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "_shipped"))
    return folder


def done(example: str, folder: Path) -> Path:
    """A copy of the project in which an example has been followed."""
    root = copied(folder)
    for block in blocks_of(example):
        block.put(root)
    return root


def told(root: Path, *arguments: str) -> str:
    """What python says of its arguments in another process, which imports the copy. Fails with what it complains of."""
    environment = {**os.environ, "PYTHONPATH": str(root), "GEMMA_FT_CACHE": str(root / "cache")}
    run = subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def shown(root: Path, script: str) -> Any:
    """What a script prints last, as JSON."""
    return json.loads(told(root, "-c", script).splitlines()[-1])
