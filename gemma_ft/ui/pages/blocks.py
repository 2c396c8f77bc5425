"""The parts a page is made of, and their HTML: one template, everything escaped, nothing that runs or loads."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gemma_ft import __version__
from gemma_ft.system.escape import printable

GENERATOR = f"gemma-ft {__version__}"
LONGEST_NAME = 44  # characters of a table's first column that stay in one line in a wide window


@dataclass(frozen=True)
class Cards:
    """Headline figures: (label, value, a remark or nothing)."""

    cards: Sequence[tuple[str, str, str]]
    kind: ClassVar[str] = "cards"


@dataclass(frozen=True)
class Table:
    """Rows of texts under headers; columns from the second on are figures unless `prose`."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    prose: bool = False
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Picture:
    """A data URI, and what it shows in words; as wide as the page, scrolled where a window is too narrow to read it."""

    uri: str
    alt: str
    kind: ClassVar[str] = "picture"


@dataclass(frozen=True)
class Pictures:
    """Small pictures side by side, or under one another where a window is narrow."""

    pictures: Sequence[Picture]
    kind: ClassVar[str] = "pictures"


@dataclass(frozen=True)
class Sample:
    """A question, the right answer, and (who, answer) of those that tried."""

    prompt: str
    expected: str
    answers: Sequence[tuple[str, str]]
    kind: ClassVar[str] = "sample"


@dataclass(frozen=True)
class Code:
    """Text as it is: a recipe, a command."""

    text: str
    kind: ClassVar[str] = "code"


@dataclass(frozen=True)
class Note:
    """A sentence that must not be missed (`warning`), or an aside."""

    text: str
    warning: bool = False
    kind: ClassVar[str] = "note"


@dataclass(frozen=True)
class Tokens:
    """Pieces of text that follow each other without a gap: (CSS class, text, a hint or nothing) of each."""

    title: str
    tokens: Sequence[tuple[str, str, str]]
    kind: ClassVar[str] = "tokens"


Block = Cards | Table | Picture | Pictures | Sample | Code | Note | Tokens


@dataclass(frozen=True)
class Section:
    """A headed part of a page."""

    title: str
    blocks: list[Block] = field(default_factory=list)


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """A whole HTML page out of its sections; those without blocks are left out. Text only shows: it is escaped, and
    control and direction characters are taken out of it.
    """
    template = _environment().get_template("page.html.j2")
    return template.render(
        title=title,
        subtitle=subtitle,
        sections=[one for one in sections if one.blocks],
        generator=GENERATOR,
        longest_name=LONGEST_NAME,
    )


@functools.cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("gemma_ft.ui.pages", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _finalize(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
