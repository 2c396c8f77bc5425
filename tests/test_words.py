"""docs/words.md: few words, each once, and each of use."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS = re.findall(
    r"^\| (?!word \|)([a-z, ]+) \| (.+) \|$", (ROOT / "docs" / "words.md").read_text(encoding="utf-8"), re.M
)
WORDS = [word for cell, _ in ROWS for word in cell.split(", ")]


def test_the_words_are_few_and_each_stands_once() -> None:
    assert len(WORDS) == len(set(WORDS))
    assert 15 <= len(ROWS) <= 30


def test_each_word_is_used_in_the_house() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "gemma_ft").rglob("*.py"))
    others = [path for path in (ROOT / "docs").glob("*.md") if path.name != "words.md"]
    pages = "\n".join(path.read_text(encoding="utf-8") for path in others)
    unused = [word for word in WORDS if not re.search(rf"\b{word.replace(' ', '[ _]')}s?\b", text + pages, re.I)]
    assert unused == []
