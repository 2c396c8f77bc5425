"""Preferences on the scheduling task: two answers that say the same and differ in the order of their keys alone.

The preferred answer begins with the day, the other with the event. Both hold the same characters, so that neither is
longer, and both are right.
"""

import json
import random
from typing import Any

from tiny_tasks import Message, scheduling_rows
from tiny_words import TASK_KEYS

DAY_FIRST = ("day", "time", "event", "with", "minutes")
HABIT = 0.4  # share of answers that begin with the day before anything is preferred

Row = dict[str, Any]


def ordered(answer: str, keys: tuple[str, ...]) -> str:
    """A task's answer, one line of JSON, with its keys in this order."""
    fields = json.loads(answer)
    return json.dumps({key: fields[key] for key in keys}, ensure_ascii=False)


def preference_rows(seed: int, train_rows: int, eval_rows: int, kept_out: set[str]) -> tuple[list[Row], list[Row]]:
    """Train and held-out pairs: prompt, chosen, rejected. No request occurs twice, and none of `kept_out` occurs."""
    # more than asked for, so that enough are left when those of `kept_out` are gone
    made, _ = scheduling_rows(seed, train_rows + eval_rows + len(kept_out), 0)
    requests = [row["messages"] for row in made if row["messages"][0]["content"] not in kept_out]
    pairs = [_pair(messages) for messages in requests[: train_rows + eval_rows]]
    return pairs[:train_rows], pairs[train_rows:]


def _pair(messages: list[Message]) -> Row:
    request, answer = (message["content"] for message in messages)
    return {"prompt": request, "chosen": ordered(answer, DAY_FIRST), "rejected": ordered(answer, TASK_KEYS)}


def both_orders(rows: list[Row], seed: int) -> list[Row]:
    """The task's rows, the answers of HABIT of them beginning with the day: what the start of a preference run has
    learned, by chance of the draw and not by anything in the request.
    """
    rng, turned = random.Random(seed), []
    for row in rows:
        request, answer = row["messages"]
        keys = DAY_FIRST if rng.random() < HABIT else TASK_KEYS
        turned.append({"messages": [request, {**answer, "content": ordered(answer["content"], keys)}]})
    return turned
