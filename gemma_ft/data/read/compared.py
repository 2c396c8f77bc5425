"""The ways in which rows hold answers that were compared: a better and a worse one, several worse ones, two answers and
who won, a list with scores or ranks.

Source: the columns of data sets as they are published: Anthropic/hh-rlhf, HuggingFaceH4/ultrafeedback_binarized and
stack-exchange-preferences, Intel/orca_dpo_pairs, argilla's pairs, hiyouga/DPO-En-Zh-20k, openbmb/UltraFeedback,
berkeley-nest/Nectar, lvwerra/stack-exchange-paired, nvidia/HelpSteer2 and 3, PKU-Alignment/PKU-SafeRLHF,
stanfordnlp/SHP, lmsys/chatbot_arena_conversations; OpenAI's preference fine-tuning; TRL 1.16, dataset formats.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_ft.data.conversation import Role, Turn, kind_of
from gemma_ft.data.read.columns import FieldError
from gemma_ft.data.read.fields import Fields, says_something, telling
from gemma_ft.data.read.row_format import LIST_FIELDS, Columns, RowFields, part_of, text_in
from gemma_ft.data.read.turns import asked, keys_of, said, turn_list
from gemma_ft.data.read.verdicts import TIE, margin_of, number_in

CHOSEN = (("chosen", "rejected"), ("preferred_output", "non_preferred_output"))
TWO = (  # first answer, second answer, what says which is better
    ("response_j", "response_k", ""),
    ("response_1", "response_2", "preference_strength"),
    ("response1", "response2", "overall_preference"),
    ("response_0", "response_1", "better_response_id"),
    ("human_ref_A", "human_ref_B", "labels"),
    ("conversation_a", "conversation_b", "winner"),
)  # fmt: skip
LISTS = ("completions", "answers", "responses", "generations", "candidates", "all_generated_responses")
TEXTS = ("response", "answer", "text", "completion", "content", "output", "generation")
HIGHER = ("overall_score", "pm_score", "score", "rating", "reward")  # the better, the more
LOWER = ("rank", "ranking")  # 1 is the best
BESIDE_LIST = {"scores": 1, "ratings": 1, "rewards": 1, "all_rm_scores": 1, "ranks": -1, "rank": -1, "ranking": -1}
QUESTIONS = ("prompt", *LIST_FIELDS, "instruction", "question", "query", "input", "context", "history")
SPOKEN = re.compile(r"\s*\n\n(Human|Assistant):")  # Anthropic's turns in one text
SPEAKERS: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Compared:
    """A better answer and worse ones, each with what it is called and by how much it is worse. `prompt`: None where the
    answers are whole chats.
    """

    prompt: list[Turn] | None
    better: tuple[str, list[Turn]]
    worse: Sequence[tuple[str, list[Turn], float | None]]


def compared_fields(row: RowFields) -> str | None:
    """The fields by which a row holds answers that were compared ("chosen, rejected"), or None."""
    for names in CHOSEN:
        if all(name in row for name in names):
            return ", ".join(names)
    for three in TWO:
        if all(name in row for name in filter(None, three)):
            return ", ".join(filter(None, three))
    found = _ranked_by(row)
    return found and f"{found[0]} with {found[2]}"


def compared(fields: Fields, columns: Columns) -> Compared:
    """What a row holds, in whichever way it does. Raises: FieldError."""
    names = next((names for names in CHOSEN if all(name in fields for name in names)), CHOSEN[0])
    if {"chosen", "rejected"} & set(columns) or names[0] in fields or names[1] in fields:
        return _chosen(fields, columns, names)
    for one, two, by in TWO:
        if all(name in fields for name in filter(None, (one, two, by))):
            return _won(fields, columns, (one, two), by)
    found = _ranked_by(fields)
    return _chosen(fields, columns, names) if found is None else _ranked(fields, columns, *found)


def _chosen(fields: Fields, columns: Columns, names: tuple[str, str]) -> Compared:
    """A better answer, and a worse one or several."""
    first, second = (part_of(fields, columns, key, (name,)) for key, name in zip(CHOSEN[0], names, strict=True))
    better = _half(*first, fields)
    many = _several(second[0])
    values = [second] if many is None else [(one, f"{second[1]}[{at}]") for at, one in enumerate(many)]
    margin = margin_of(fields, columns)
    worse = [(repr(name), _half(value, name, fields), margin) for value, name in values]
    if fields.look("messages") == fields.look("chosen"):
        fields.get("messages")  # the chosen chat again
    return Compared(_prompt(fields, columns, better), (repr(first[1]), better), worse)


def _won(fields: Fields, columns: Columns, names: tuple[str, str], by: str) -> Compared:
    """Two answers, and what says which is better."""
    value, margin, first = fields[by] if by else None, None, True
    if by in ("preference_strength", "overall_preference"):
        number = number_in(value, by)
        if number == 0:
            raise FieldError(f"{by!r} is 0: {TIE}")
        first, margin = number < 0, abs(number)
    elif by == "winner":
        if value not in ("model_a", "model_b"):
            tied = isinstance(value, str) and value.startswith("tie")
            raise FieldError(
                f"{by!r} is {value!r}: {TIE}" if tied else f"{by!r} is {value!r}, expected model_a or model_b"
            )
        first = value == "model_a"
    elif by:
        if isinstance(value, bool) or value not in (0, 1, "0", "1"):
            raise FieldError(f"{by!r} is {value!r}, expected 0 or 1")
        first = int(value) == (1 if by == "labels" else 0)
    halves = [(repr(name), _half(fields[name], name, fields)) for name in names]
    better, worse = halves if first else halves[::-1]
    if "margin" in columns or fields.look("margin") is not None:
        margin = margin_of(fields, columns)
    return Compared(_prompt(fields, columns, better[1]), better, [(*worse, margin)])


def _ranked(fields: Fields, columns: Columns, name: str, text: str, by: str) -> Compared:
    """The best of a list against each that is worse; what is as good as the best is compared with none."""
    values = fields[name]
    if text:
        sign = 1 if by in HIGHER else -1
        for at, one in enumerate(values):
            if not isinstance(one, Mapping) or text not in one or by not in one:
                raise FieldError(f"'{name}[{at}]' is {kind_of(one)}, expected an object with {text} and {by}")
            fields.passed_over += [f"{name}[].{key}" for key in sorted(telling(one, one.keys() - {text, by}))]
        numbers = [number_in(one[by], f"{name}[{at}].{by}") for at, one in enumerate(values)]
        answers = [_half(one[text], f"{name}[{at}].{text}", fields) for at, one in enumerate(values)]
    else:
        sign, beside = BESIDE_LIST[by], fields[by]
        if not isinstance(beside, list) or len(beside) != len(values):
            got = f"a list of {len(beside)}" if isinstance(beside, list) else kind_of(beside)
            raise FieldError(f"{by!r} is {got}, expected a number for each of the {len(values)} in {name!r}")
        numbers = [number_in(one, f"{by}[{at}]") for at, one in enumerate(beside)]
        answers = [_half(one, f"{name}[{at}]", fields) for at, one in enumerate(values)]
    best = max(range(len(numbers)), key=lambda at: sign * numbers[at])
    scored = sign > 0
    worse = [
        (f"'{name}[{at}]'", answers[at], abs(numbers[best] - numbers[at]) if scored else None)
        for at in range(len(numbers))
        if numbers[at] != numbers[best]
    ]
    if not worse:
        raise FieldError(f"{name!r} has answers that are all equal in {by!r}: {TIE}")
    return Compared(_prompt(fields, columns, answers[best]), (f"'{name}[{best}]'", answers[best]), worse)


def _ranked_by(row: RowFields) -> tuple[str, str, str] | None:
    """(list, what the text of its objects is called, what ranks them) of a row; where it is of texts, "" and the list
    that ranks them.
    """
    look = row.look if isinstance(row, Fields) else row.get
    for name in LISTS:
        values = look(name) if name in row else None
        first = values[0] if isinstance(values, list) and values else None
        if isinstance(first, Mapping):
            text = next((one for one in TEXTS if one in first), None)
            by = next((one for one in (*HIGHER, *LOWER) if one in first), None)
            if text and by:
                return name, text, by
        elif isinstance(first, str | list):
            beside = next((one for one in BESIDE_LIST if isinstance(look(one), list)), None)
            if beside:
                return name, "", beside
    return None


def _several(value: Any) -> list[Any] | None:
    """The answers in a list of several: texts, lists of turns, or turns that are all answers; None for one answer."""
    if not isinstance(value, list) or not value:
        return None
    if isinstance(value[0], str | list):
        return value
    keys = keys_of(value)
    answers = keys is not None and len(value) > 1 and all(
        isinstance(one, dict) and one.get(keys[0]) == value[0][keys[0]] for one in value
    )  # fmt: skip
    return value if answers else None


def _half(value: Any, name: str, fields: Fields) -> list[Turn]:
    """An answer, or a whole chat: also as one text with Anthropic's marks of turns."""
    if isinstance(value, str):
        if keys_of(value):
            value = turn_list(value, name)
        elif SPOKEN.match(value):
            return _spoken(value, name)
    if isinstance(value, list) and not value:
        raise FieldError(f"{name!r} is empty")
    return said(value, name, "assistant", fields)


def _spoken(text: str, name: str) -> list[Turn]:
    """The turns of a text that marks them "Human:" and "Assistant:", each after a blank line."""
    _, *parts = SPOKEN.split(text)
    turns = [Turn(SPEAKERS[role], said.strip()) for role, said in zip(parts[::2], parts[1::2], strict=True)]
    if turns[0].role != "user":
        raise FieldError(f"{name!r} begins with 'Assistant:', expected 'Human:'")
    return turns


def _prompt(fields: Fields, columns: Columns, better: Sequence[Turn]) -> list[Turn] | None:
    """The turns of a row's prompt, or None where its answers are whole chats."""
    name = next((name for name in QUESTIONS if name in fields and says_something(fields.look(name))), "prompt")
    if better[0].role != "assistant":
        return None
    if "prompt" not in columns and name not in fields:
        raise FieldError(
            f"no field 'prompt'; the row has {', '.join(map(str, fields))}; map it with data.columns.prompt, or "
            "give whole chats, as lists of turns, in 'chosen' and 'rejected'"
        )
    if "prompt" not in columns and name == "instruction":
        given = text_in(fields, "input", optional=True)
        question = text_in(fields, "instruction")
        return [Turn("user", f"{question}\n\n{given}" if given.strip() else question)]
    value, name = part_of(fields, columns, "prompt", (name,))
    if isinstance(value, Mapping) and "messages" in value:  # OpenAI's input
        left = telling(value, value.keys() - {"messages", "parallel_tool_calls"})
        fields.passed_over += [f"{name}.{key}" for key in sorted(left)]
        value = value["messages"]
    if isinstance(value, str) and keys_of(value):
        value = turn_list(value, name)
    if isinstance(value, str) and SPOKEN.match(value):
        turns = _spoken(value, name)
        return asked(turns[:-1] if turns[-1].role == "assistant" and not turns[-1].content else turns)
    return asked(said(value, name, "user", fields))


def check_beside(fields: Fields, columns: Columns, head: Sequence[Turn], names: tuple[str, str]) -> None:
    """Reads the prompt that stands beside two whole chats. Raises: FieldError where it is in no turn that both have."""
    if "prompt" in columns:
        value = part_of(fields, columns, "prompt")[0]
    elif not says_something(fields.look("prompt")):
        return
    else:
        value = fields["prompt"]
    if isinstance(value, str) and not keys_of(value):
        found = _spoken(value, "prompt") if SPOKEN.match(value) else [Turn("user", value)]
    else:
        found = said(turn_list(value, "prompt") if isinstance(value, str) else value, "prompt", "user", fields)
    texts = [turn.content.strip() for turn in head]
    if any(turn.content.strip() not in ("", *texts) for turn in found):
        raise FieldError(f"'prompt' is not in what {names[0]} and {names[1]} begin with; take it out, or mend the row")
