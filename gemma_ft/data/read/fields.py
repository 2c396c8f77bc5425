"""The fields of a row, and which of them a parser read: what was left is told, unless its name is harmless."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gemma_ft.families.chat_template import TURNS, ChatTemplate

# Where a row comes from, how it is filed, and figures of it: nothing that a model could learn from.
HARMLESS = {
    "id", "ids", "idx", "index", "uid", "uuid", "guid", "key", "hash", "md5", "sha1", "sha256", "fingerprint",
    "row", "rowid", "row_number", "line", "line_number", "source", "sources", "src", "origin", "provenance",
    "dataset", "dataset_name", "data_source", "subset", "split", "config", "category", "categories", "topic",
    "topics", "domain", "tag", "tags", "keywords", "kind", "type", "difficulty", "level", "language", "languages",
    "lang", "locale", "meta", "metadata", "info", "extra_info", "name", "url", "urls", "uri", "link", "license",
    "licence", "copyright", "author", "authors", "annotator", "worker", "date", "time", "datetime", "timestamp",
    "created", "updated", "modified", "model", "model_name", "generator", "generated_by", "version", "revision",
    "score", "scores", "rating", "ratings", "quality", "perplexity", "tokens", "length", "cache_control",
    "annotations", "is_classification", "is_synthetic",
}  # fmt: skip
NAME_SHOWN = 60
HARMLESS_FORMS = re.compile(
    r"(?:|_.*|unnamed: ?\d+|(?:n|num|score)_\w+"  # "", "Unnamed: 0": an index that pandas wrote
    r"|\w+_(?:id|ids|idx|index|uuid|hash|url|uri|at|date|time|timestamp|score|rating|tokens|length|count))"
)


class Fields(Mapping[str, Any]):
    """A row's fields. Asking for one by `[]` or `get` reads it; `in` and going through the names do not. `chat`: whose
    way of making one text of several parts is meant.
    """

    __slots__ = ("_read", "_values", "chat", "passed_over")

    def __init__(self, values: Mapping[str, Any], chat: ChatTemplate = TURNS) -> None:
        self._values, self.chat = values, chat
        self._read: set[str] = set()
        self.passed_over: list[str] = []  # paths of what lies deeper and was not read, as parsers found it

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return self._values[name]

    def get(self, name: str, default: Any = None) -> Any:
        """See the class."""
        self._read.add(name)
        return self._values.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def look(self, name: str) -> Any:
        """The value of a field, or None, without reading it."""
        return self._values.get(name)

    def unread(self) -> tuple[str, ...]:
        """The paths of all that says something and was not read: "system", "messages[].tool_calls"."""
        left = [name for name in self._values if name not in self._read]
        found = [*telling(self._values, left), *self.passed_over]
        return tuple(dict.fromkeys(found))


def telling(values: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Those of some names whose values say something that a model could learn."""
    return [_printable(str(name)) for name in names if says_something(values[name]) and not harmless(str(name))]


def _printable(name: str) -> str:
    """A name that can stand in a line: a key of a row may be anything."""
    short = name if len(name) <= NAME_SHOWN else f"{name[:NAME_SHOWN]}..."
    return short if short.isprintable() else ascii(short)


def says_something(value: Any) -> bool:
    """Whether a field holds more than a table's absent cell: no null, and nothing that is empty."""
    return value is not None and not (isinstance(value, str | list | dict | tuple) and not value)


@functools.lru_cache(4096)  # rows have the same few names
def harmless(name: str) -> bool:
    """Whether a field of this name needs no word when it is not read."""
    lower = name.strip().lower()
    return lower in HARMLESS or HARMLESS_FORMS.fullmatch(lower) is not None
