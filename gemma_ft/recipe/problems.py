"""What is wrong with a recipe: where, which key, what was found, what to do; many of them make one error."""

import difflib
from collections.abc import Iterable
from typing import Any, NamedTuple

from gemma_ft.errors import RecipeError

KeyPath = tuple[str | int, ...]
COMMAND_LINE = "command line"


class Mark(NamedTuple):
    """Where something was written: a file and line, or the command line (no line)."""

    label: str
    line: int | None = None

    def __str__(self) -> str:
        return self.label if self.line is None else f"{self.label}:{self.line}"


class Fault(NamedTuple):
    """One thing that is wrong: where, the dotted key (may be empty), and what was found and what to do."""

    mark: Mark
    key: str
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in (str(self.mark), self.key, self.text) if part)


def refuse(faults: Iterable[Fault]) -> None:
    """Every fault in one error, a line each: by file and line, the command line last; nothing when there is none.

    Raises: RecipeError.
    """
    order = sorted(faults, key=lambda f: (f.mark.label == COMMAND_LINE, f.mark.label, f.mark.line or 0))
    if order:
        raise RecipeError("\n".join(dict.fromkeys(map(str, order))))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'rank'?` when a known word is close, else an empty text."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def dotted(path: KeyPath) -> str:
    """`train.learning_rate` out of its parts."""
    return ".".join(shown(part)[1:-1] if isinstance(part, str) else str(part) for part in path)


def shown(value: Any) -> str:
    """A value as a message shows it: on one line, and short."""
    if isinstance(value, dict):
        return "a block of keys"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]}...{text[-1]}"
