"""Rows of a data file -> what a model is asked: the formats of training, in which the answer may be missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_ft.data.conversation import Conversation, PlainText, Turn, text_fault
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.read.bad_rows import BadRows
from gemma_ft.data.read.columns import BESIDE, FieldError, fill_value
from gemma_ft.data.read.detect import detect_format
from gemma_ft.data.read.parse_rows import parse_rows
from gemma_ft.data.read.row_format import LIST_FIELDS, formats
from gemma_ft.data.read.sources import Row
from gemma_ft.data.read.turns import SPEAKERS, TURN_ROLES, keys_of, turn_list
from gemma_ft.errors import DataError, UserError
from gemma_ft.families.chat_template import TURNS, ChatTemplate

UNANSWERED = ""  # put where a row has no answer, so that one parser serves training and asking; no model sees it
ASKING = {name for name, role in TURN_ROLES.items() if role == "user"}
ANSWERING = dict(zip(SPEAKERS, ("assistant", "gpt"), strict=True))

Fields = Mapping[str, Any]
Columns = Mapping[str, str]


@dataclass(frozen=True)
class Prompt:
    """What one row asks: the turns of a chat that end with a question, or (`text`) a text to be continued."""

    row: Row
    turns: tuple[Turn, ...] = ()
    text: str | None = None


def prompts_of(
    rows: Sequence[Row],
    *,
    format: str = "auto",
    columns: Columns | None = None,
    system: str | None = None,
    raw: bool = False,
    chat: ChatTemplate = TURNS,
) -> list[Prompt]:
    """One prompt for each row, in order, out of any format that training reads.

    An answer at the end of a row is not part of its prompt. `system` goes before rows that have no system turn of their
    own. `raw`: the one question of a row is a text to be continued; rows of the format text always are.
    `chat`: as parse_rows has it.

    Raises: DataError listing bad rows as `file:line: reason`, or saying why no format fits.
    """
    columns = {key: template for key, template in (columns or {}).items() if key != "weight"}  # of training alone
    if "prompt" in columns:
        columns.setdefault("completion", UNANSWERED)
    if format == "auto":
        format = detect_format([Row(row.where, _with_answer(row.fields)) for row in rows], columns)[0]
    parse_rows([], format=format, columns=columns)  # what is wrong with these two is no row's fault
    bad = BadRows()
    prompts: list[Prompt] = []
    for row in rows:
        try:
            whole = row if set(columns) - BESIDE else Row(row.where, _with_answer(row.fields, format))
            whole = _with_last_turn(whole, columns)
            items = parse_rows([whole], format=format, columns=_found(columns), trained=False, chat=chat)
            if len(items) > 1:
                raise FieldError(f"holds {len(items)} questions; give each a row of its own")
            item = items[0]
            prompt = _of_document(row, item) if isinstance(item, PlainText) else _of_chat(row, item, system, raw)
            prompts.append(prompt)
        except (DataError, FieldError) as fault:
            bad.add(row.where, str(fault).removeprefix(f"{row.where}: "))
    bad.raise_if_any()
    return prompts


def system_turns(encoder: ChatEncoder, text: str | None) -> list[Turn]:
    """The turn that a system text becomes; none when there is no text.

    Raises: UserError when the model was trained so that it would be refused, or would change nothing.
    """
    if not text:
        return []
    fault = text_fault(text)
    if fault:
        raise UserError(f"the system text {fault}")
    if encoder.system_policy in ("error", "drop"):
        done = {"error": "refuse", "drop": "leave out"}[encoder.system_policy]
        raise UserError(f"this model was trained to {done} system texts; put the text into the question")
    return [Turn("system", text)]


def _of_document(row: Row, item: PlainText) -> Prompt:
    if not item.text.strip():
        raise FieldError("the text is empty")
    return Prompt(row, text=item.text)


def _of_chat(row: Row, item: Conversation, system: str | None, raw: bool) -> Prompt:
    turns = item.turns[:-1]  # the last is the assistant's
    if not turns[-1].content.strip():
        raise FieldError("the question is empty")
    if raw:
        if len(turns) > 1:
            raise FieldError(f"has {len(turns)} turns; --raw continues the one text of a row")
        return Prompt(row, text=turns[0].content)
    if system and turns[0].role != "system":
        turns = (Turn("system", system), *turns)
    return Prompt(row, turns)


def _with_answer(fields: Fields, format: str = "auto") -> dict[str, Any]:
    """A row's fields with an answer beside a question that has none, as `format` or the first of any would have it."""
    known = formats().values() if format == "auto" else [formats()[format]]
    name = next((name for one in known if (name := one.answer_field(fields)) is not None), None)
    return dict(fields) if name is None else {**fields, name: fields.get(name, UNANSWERED)}


def _with_last_turn(row: Row, columns: Columns) -> Row:
    """A row whose list of turns ends with an answer where it ended with a question; a list that `columns` names is
    found under "messages" in any case.
    """
    fields = dict(row.fields)
    name = next((name for name in LIST_FIELDS if name in fields), LIST_FIELDS[0])
    if "messages" in columns:
        name, fields[LIST_FIELDS[0]] = LIST_FIELDS[0], fill_value(columns["messages"], fields)
    keys = keys_of(fields.get(name))
    if keys is not None:
        turns, (speaker, said) = turn_list(fields[name], name), keys
        if isinstance(turns[-1], dict) and turns[-1].get(speaker) in ASKING:
            fields[name] = [*turns, {speaker: ANSWERING[keys], said: UNANSWERED}]
    return Row(row.where, fields)


def _found(columns: Columns) -> dict[str, str]:
    """`columns` for rows that went through `_with_last_turn`."""
    return {**columns, "messages": "{" + LIST_FIELDS[0] + "}"} if "messages" in columns else dict(columns)
