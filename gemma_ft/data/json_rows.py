"""JSON as data sets have it: one object per line, or one list of objects."""

import json
import re
from collections.abc import Iterator
from typing import Any

from gemma_ft.data.items import kind_of
from gemma_ft.errors import DataError, first_line

MAX_ROW_BYTES = 64 * 2**20
BLANKS = re.compile(r"[ \t\r\n]*")


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


def objects_in(source: str, text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line, object, or why there is none) for each element of the list `text`. Raises: DataError where it breaks."""
    for line, value in _list_elements(source, text):
        yield line, _object(value)


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} (column {error.colno})"
    return "nested too deeply" if isinstance(error, RecursionError) else first_line(error)


def _list_elements(source: str, text: str) -> Iterator[tuple[int, Any]]:
    """(line where it begins, value) for each element of the JSON list `text`. Raises: DataError where it breaks."""
    position = _after_blanks(text, _after_blanks(text, 0) + 1)
    line, counted = 1, 0
    done = text[position : position + 1] == "]"
    if done:
        position = _after_blanks(text, position + 1)
    while not done:
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{source}:{error.lineno}: {_json_fault(error)}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{source}:{line}: {_json_fault(error)}") from error
        yield line, value
        position = _after_blanks(text, position)
        mark = text[position : position + 1]
        if mark not in (",", "]") or not mark:
            at = text.count("\n", 0, position) + 1
            raise DataError(f"{source}:{at}: not valid JSON: expected ',' or ']' after an element")
        done = mark == "]"
        position = _after_blanks(text, position + 1)
    if position < len(text):
        at = text.count("\n", 0, position) + 1
        raise DataError(f"{source}:{at}: not valid JSON: text after the end of the list")


def _after_blanks(text: str, position: int) -> int:
    found = BLANKS.match(text, position)
    return found.end() if found else position
