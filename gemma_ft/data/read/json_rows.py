"""JSON as data sets have it: one object per line, one list of objects, or an object around such a list."""

import json
import re
from collections.abc import Iterator
from typing import Any

from gemma_ft.data.conversation import kind_of
from gemma_ft.errors import DataError, first_line

MAX_ROW_BYTES = 64 * 2**20
BLANKS = re.compile(r"[ \t\r\n]*")
DOCUMENT = re.compile(rb'\s*(\{[ \t]*\r?\n\s*["}]|\[[ \t]*\r?\n\s*[{\]])')
LISTS = ("data", "rows", "examples", "records", "items", "instances")  # what such an object calls its list
BESIDE = {  # what it may say beside it: of the whole, and of no row
    *("version", "name", "title", "type", "description", "id", "source", "url", "homepage", "license", "licence"),
    *("language", "author", "citation", "date", "created", "created_at", "count", "total", "num_rows", "split"),
    *("features", "schema", "info", "metadata", "meta"),
}


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return fields


DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)


def object_in(line: bytes) -> dict[str, Any] | str:
    """The object that one line holds, or why it holds none."""
    if len(line) > MAX_ROW_BYTES:
        return f"the row has more than {MAX_ROW_BYTES:,} bytes"
    try:
        value = DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"not valid UTF-8 (byte 0x{line[error.start]:02x})"
    except (ValueError, RecursionError) as error:
        return _json_fault(error)
    return _object(value)


def _object(value: Any) -> dict[str, Any] | str:
    return value if isinstance(value, dict) else f"expected an object, got {kind_of(value)}"


def begins_a_document(head: bytes) -> bool:
    """Whether a file of lines begins as JSON over several lines: a bracket alone, and what may stand next in it."""
    return DOCUMENT.match(head) is not None


def holds_a_list(text: str) -> bool:
    """Whether `text` is an object around a list of rows, as {"version": 1, "data": [{...}, {...}]}."""
    return _list_in(text) is not None


def objects_in(source: str, text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line, object, or why there is none) for each element of the list in `text` (see `holds_a_list`), or for each of
    the objects that follow one another in it. Raises: DataError where it breaks.
    """
    start = _after_blanks(text, 0)
    inside = start if text[start : start + 1] == "[" else _list_in(text)
    found = _in_a_row(source, text, start) if inside is None else _list_elements(source, text, inside)
    for line, value in found:
        yield line, _object(value)


def _list_in(text: str) -> int | None:
    """Where the list of rows begins in an object around it; None where `text` is none."""
    position = _after_blanks(text, 0)
    try:
        whole, end = DECODER.raw_decode(text, position)
    except (ValueError, RecursionError):
        return None
    lists = [key for key in LISTS if isinstance(whole, dict) and _are_objects(whole.get(key))]
    if len(lists) != 1 or _after_blanks(text, end) < len(text) or not set(whole) <= BESIDE | set(lists):
        return None
    key = None
    while key != lists[0]:  # behind "{" or ",": a key, ":" and its value
        key, position = DECODER.raw_decode(text, _after_blanks(text, position + 1))
        begin = _after_blanks(text, _after_blanks(text, position) + 1)
        position = _after_blanks(text, DECODER.raw_decode(text, begin)[1])
    return begin


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} (column {error.colno})"
    return "nested too deeply" if isinstance(error, RecursionError) else first_line(error)


def _list_elements(source: str, text: str, start: int) -> Iterator[tuple[int, Any]]:
    """(line where it begins, value) for each element of the JSON list that begins at `start`, and in whose place `text`
    has nothing else than the object around it. Raises: DataError where it breaks.
    """
    position = _after_blanks(text, start + 1)
    line, counted = 1, 0
    done = text[position : position + 1] == "]"
    if done:
        position = _after_blanks(text, position + 1)
    while not done:
        line, counted = line + text.count("\n", counted, position), position
        value, position = _value_at(source, text, position, line)
        yield line, value
        position = _after_blanks(text, position)
        mark = text[position : position + 1]
        if mark not in (",", "]") or not mark:
            at = text.count("\n", 0, position) + 1
            raise DataError(f"{source}:{at}: not valid JSON: expected ',' or ']' after an element")
        done = mark == "]"
        position = _after_blanks(text, position + 1)
    if position < len(text) and not text[:start].strip():
        at = text.count("\n", 0, position) + 1
        raise DataError(f"{source}:{at}: not valid JSON: text after the end of the list")


def _in_a_row(source: str, text: str, position: int) -> Iterator[tuple[int, Any]]:
    """(line where it begins, value) for each of the values that follow one another. Raises: DataError."""
    line, counted = 1, 0
    while position < len(text):
        line, counted = line + text.count("\n", counted, position), position
        value, position = _value_at(source, text, position, line)
        yield line, value
        position = _after_blanks(text, position)


def _value_at(source: str, text: str, position: int, line: int) -> tuple[Any, int]:
    try:
        return DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise DataError(f"{source}:{error.lineno}: {_json_fault(error)}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}:{line}: {_json_fault(error)}") from error


def _after_blanks(text: str, position: int) -> int:
    found = BLANKS.match(text, position)
    return found.end() if found else position
