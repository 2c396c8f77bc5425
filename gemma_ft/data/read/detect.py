"""Which format rows have: told with its reason; two possible readings are refused, and what is none says why."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gemma_ft.data.conversation import RowKind, kind_of
from gemma_ft.data.read.columns import BESIDE, COLUMN_KEYS, check_templates
from gemma_ft.data.read.row_format import LIST_FIELDS, Columns, formats
from gemma_ft.data.read.sources import Row
from gemma_ft.data.read.turns import TOOL_ROLES, TURN_ROLES
from gemma_ft.data.read.verdicts import verdict_name
from gemma_ft.errors import DataError

SAMPLED_ROWS = 100
ONE_CHAT = 'write each chat as one row, {"messages": [{"role": "user", "content": "..."}, ...]}'
SINGLE = ("content", "text", "value", "message")  # what one message is called where each has a row of its own
SINGLE_ROLES = {*TURN_ROLES, *TOOL_ROLES, "prompter", "bot", "ai"}

Fields = Mapping[str, Any]


def detect_format(rows: Sequence[Row], columns: Columns | None = None, kind: RowKind = "answers") -> tuple[str, str]:
    """(format, one-line reason) for these rows: what most of the first rows have, or what `columns` names. `kind`: what
    is wanted of them.

    Raises: DataError when no format fits, or more than one does, or none of the wanted kind.
    """
    columns = columns or {}
    _check_columns(columns)
    if not rows:
        raise DataError("no rows to tell a format from")
    source, sample = rows[0].where.rpartition(":")[0], rows[:SAMPLED_ROWS]
    if set(columns) - BESIDE:
        return _named(sample, columns, kind)
    votes: dict[tuple[str, str], int] = {}
    for row in sample:
        for reading in _readings(row.fields, columns, kind):
            votes[reading] = votes.get(reading, 0) + 1
    if not votes and kind != "answers":
        raise DataError(f"{source}: {_without_kind(sample[0].fields, columns, kind)}")
    fitting = [reading for reading, count in votes.items() if 2 * count >= len(sample)] or list(votes)
    single = [row.fields for row in sample if _single_message(row.fields)]
    if len(fitting) == 1 and (not formats()[fitting[0][0]].documents or 2 * len(single) < len(sample)):
        name, why = fitting[0]
        if kind == "labelled" and "label" in columns and formats()[name].pairs is not None:
            raise DataError(
                f"{source}: the rows have {why}, each of which becomes a good and a bad answer, and no label is read; "
                "take label out of data.columns"
            )
        return name, f"the rows have {why}{_of_kind(name, sample, columns, kind)}"
    if len(fitting) <= 1:
        raise DataError(f"{source}: {_reason_against(single[0] if fitting else rows[0].fields)}")
    both = " and ".join(f"{name} ({why})" for name, why in fitting)
    raise DataError(f"{source}: {both} fit; set data.format, or data.columns")


def check_format(format: str, columns: Columns) -> None:
    """Raises: DataError for a format that is unknown, or that `columns` do not go with; "auto" goes with all."""
    _check_columns(columns)
    if format == "auto":
        return
    if format not in formats():
        raise DataError(f"data.format: unknown format {format!r}; use auto, {', '.join(formats())}")
    known = formats()[format]
    if set(columns) - ({"weight"} if known.documents else BESIDE) - known.columns:
        raise DataError(f"data.columns: {', '.join(columns)} cannot be used with format {format}")


def _check_columns(columns: Columns) -> None:
    """Nothing when the templates are well formed and belong to one format; what they do not name keeps its own name.

    Raises: DataError naming the key.
    """
    check_templates(columns)
    keys = set(columns) - BESIDE
    sets = {known.columns for known in formats().values()}
    if not any(keys <= one for one in sets):
        groups = [_ordered(one) for one in sets if one]
        together = [_listed(one) for one in sorted(groups, key=lambda one: COLUMN_KEYS.index(one[-1]))]
        texts = _listed(_ordered({key for known in formats().values() if known.documents for key in known.columns}))
        raise DataError(
            f"data.columns: got {', '.join(sorted(columns))}, which are of different formats; give "
            f"{', or '.join(together)} (weight goes with all, system, label and margin with all but {texts})"
        )
    plain = [known for known in formats().values() if known.documents and keys and keys <= known.columns]
    turned = next((key for key in COLUMN_KEYS if key in BESIDE & set(columns) - {"weight"}), None)
    if plain and turned:
        raise DataError(
            f"data.columns: {turned} does not go with {_listed(_ordered(keys))}; a plain document has no turns"
        )


def _named(sample: Sequence[Row], columns: Columns, kind: RowKind) -> tuple[str, str]:
    """The format that `columns` name; of several, the one that most rows fit, of equals the one with most columns."""
    keys = set(columns) - BESIDE
    named = {name: known for name, known in formats().items() if keys <= known.columns}
    if kind == "pairs":
        named = {name: known for name, known in named.items() if known.pairs is not None} or named
    first = sorted(named, key=lambda name: -len(named[name].columns))
    name = max(first, key=lambda name: sum(named[name].fits(row.fields, columns) for row in sample))
    alike = [one for one in named.values() if one.columns == named[name].columns]
    turns = f", whose turns are those of {name}" if len(alike) > 1 else ""
    return name, f"data.columns names {_listed(_ordered(keys))}{turns}"


def _readings(fields: Fields, columns: Columns, kind: RowKind) -> list[tuple[str, str]]:
    """Every (format, fields that say so) this row could be read as: lists of turns first, documents last. As rows with
    a label only where it has one, else by its pairs.
    """
    judged = kind == "labelled" and verdict_name(fields, columns) is not None
    named = []
    for name, known in formats().items():
        if kind == "answers" or (judged and known.labelled is not None):
            named += [(known, name, why) for why in known.readings(fields)]
    if kind == "pairs" or (kind == "labelled" and not named):
        named = [(known, name, why) for name, known in formats().items() for why in known.pair_readings(fields)]
    lists = {name: place for place, name in enumerate(LIST_FIELDS)}
    named.sort(key=lambda one: (one[0].documents, lists.get(one[2], len(lists))))
    return [(name, why) for _, name, why in named]


def _of_kind(format: str, sample: Sequence[Row], columns: Columns, kind: RowKind) -> str:
    """What is told of pairs that are no pairs to the objective, and of where labels come from."""
    paired = formats()[format].pairs is not None
    if kind != "labelled":
        return "; the chosen answers are trained, the rejected ones not used" if paired and kind == "answers" else ""
    if paired:
        return "; each pair becomes two answers, a good and a bad one"
    name = next(filter(None, (verdict_name(row.fields, columns) for row in sample)), "label")
    values = [row.fields.get(name.strip(" {}")) for row in sample]
    as_numbers = any(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return f", and {name}, in which 1 is a good answer and 0 a bad one" if as_numbers else f", and {name}"


def _without_kind(fields: Fields, columns: Columns, kind: RowKind) -> str:
    """Why rows of another kind cannot be learned from, and what to do."""
    answers = _readings(fields, columns, "answers")
    if kind == "pairs" and _readings(fields, columns, "labelled"):
        return (
            f"the rows have {answers[0][1]} and a label, and this objective compares two answers to one prompt; set "
            "objective.kind: kto, or give rows with prompt, chosen and rejected"
        )
    if not answers:
        return _reason_against(fields)
    if kind == "pairs":
        return (
            f"the rows have {answers[0][1]}, one answer each, and this objective compares two; give rows with prompt, "
            "chosen and rejected, or set objective.kind: sft"
        )
    return (
        f"the rows have {answers[0][1]}, and nothing that says whether an answer is a good one; give each a label, "
        "true or false, or name its field with data.columns.label"
    )


def _ordered(keys: Collection[str]) -> list[str]:
    return sorted(keys, key=COLUMN_KEYS.index)


def _reason_against(fields: Fields) -> str:
    """Why a row has no known format, and what to do."""
    names = ", ".join(map(str, fields)) or "none"
    if found := _export(fields):
        return f"the rows are {found}, which data.columns cannot map; {ONE_CHAT}"
    if found := _single_message(fields):
        return f"each row is one message ({found}); {ONE_CHAT}, or set data.format: text to learn each alone as text"
    name = next((name for name in LIST_FIELDS if name in fields), None)
    if name is None:
        return f"no known format has the fields {names}; map them with data.columns"
    return f"{name!r} {_no_turns(fields[name])}; {ONE_CHAT}"


def _export(fields: Fields) -> str | None:
    """Whose export a row comes from, where it is one of a whole account or of another service's tuning data."""
    if isinstance(fields.get("mapping"), dict):
        return "an export of ChatGPT (mapping: a tree of messages)"
    if isinstance(fields.get("chat_messages"), list):
        return "an export of Claude (chat_messages)"
    contents = fields.get("contents")
    if isinstance(contents, list) and contents and isinstance(contents[0], dict) and "parts" in contents[0]:
        return "of Gemini's API (contents with parts)"
    return None


def _single_message(fields: Fields) -> str | None:
    """The fields that make a row one message of a chat, as OpenAssistant's are published; None for any other row."""
    role, said = fields.get("role", fields.get("from")), next((name for name in SINGLE if name in fields), None)
    if not isinstance(role, str) or role.lower() not in SINGLE_ROLES or said is None:
        return None
    return f"{'role' if 'role' in fields else 'from'}, {said}"


def _no_turns(value: Any) -> str:
    """What stands where a list of turns is expected."""
    if isinstance(value, str):
        return "is text, and no list of turns in JSON"
    if not isinstance(value, list):
        return f"is {kind_of(value)}, expected a list of turns"
    if not value:
        return "is an empty list"
    held = f"an object with {', '.join(map(str, value[0]))}" if isinstance(value[0], dict) else kind_of(value[0])
    return f"is a list whose first element is {held}, expected a turn with role and content, or from and value"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
