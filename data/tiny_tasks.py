"""The scheduling task: plain-English requests, their one-line JSON answers, and the prose answers of the base model."""

import json
import random
from dataclasses import dataclass

from tiny_words import DAYS, EVENTS, NAMES, SURNAMES, TEAMS, article, number_words

Message = dict[str, str]
MINUTES = (10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 75, 90, 120, 180)
OPENINGS = (
    "Book", "Schedule", "Please book", "Please schedule", "Set up", "Please set up", "Can you book", "Plan", "Add",
    "Could you schedule", "I need", "I want", "I would like", "Please add", "Arrange", "Put in", "Can you plan",
    "We need", "Let us have", "Please arrange",
)  # fmt: skip
GREETINGS = ("Hi! ", "Hello! ", "Hey! ", "Good morning! ", "Hi there! ")
CLOSINGS = (" Thanks!", " Thank you.", " Thanks a lot.")


@dataclass(frozen=True)
class Appointment:
    """What a request asks for: the five values that an answer must hold. hour and minute are of a 24-hour clock."""

    event: str
    person: str
    day: str
    hour: int
    minute: int
    minutes: int

    @property
    def time(self) -> str:
        """HH:MM on a 24-hour clock."""
        return f"{self.hour:02d}:{self.minute:02d}"


def random_person(rng: random.Random) -> str:
    """A first name mostly; sometimes a doctor or a team."""
    draw = rng.random()
    if draw < 0.8:
        return rng.choice(NAMES)
    return f"Dr. {rng.choice(SURNAMES)}" if draw < 0.9 else f"the {rng.choice(TEAMS)} team"


def random_appointment(rng: random.Random) -> Appointment:
    """One appointment, every value drawn on its own; times lie on five minutes from 07:00 to 20:55."""
    hour, minute = rng.randrange(7, 21), rng.choice((0, 0, 0, 15, 30, 30, 45, *range(0, 60, 5)))
    return Appointment(rng.choice(EVENTS), random_person(rng), rng.choice(DAYS), hour, minute, rng.choice(MINUTES))


def part_of_day(hour: int) -> str:
    """'in the morning' and the like, from an hour of a 24-hour clock."""
    if hour < 12:
        return "in the morning"
    return "in the afternoon" if hour < 18 else "in the evening"


def time_in_words(hour: int, minute: int) -> str:
    """A spoken time from a 24-hour clock: 'half past two in the afternoon', 'five to nine in the morning', 'noon'."""
    if (hour, minute) == (12, 0):
        return "noon"
    past = minute <= 30
    word = number_words(((hour if past else hour + 1) - 1) % 12 + 1)
    if minute == 0:
        spoken = f"{word} o'clock"
    elif minute == 30:
        spoken = f"half past {word}"
    else:
        distance = minute if past else 60 - minute
        spoken = f"{'quarter' if distance == 15 else number_words(distance)} {'past' if past else 'to'} {word}"
    return f"{spoken} {part_of_day(hour)}"


def time_with_half(hour: int, minute: int) -> str:
    """A time with am or pm from a 24-hour clock: '2:30 pm', '9 am'."""
    clock = str((hour - 1) % 12 + 1) + (f":{minute:02d}" if minute else "")
    return f"{clock} {'am' if hour < 12 else 'pm'}"


def say_time(rng: random.Random, hour: int, minute: int) -> str:
    """One of the three ways to say a time: 24-hour digits, digits with am or pm, words."""
    draw = rng.random()
    if draw < 0.4:
        return f"{hour:02d}:{minute:02d}"
    return time_with_half(hour, minute) if draw < 0.7 else time_in_words(hour, minute)


def say_minutes(rng: random.Random, minutes: int) -> str:
    """A duration as digits, as words, or as hours where it is a round number of half hours."""
    round_forms = {30: "half an hour", 60: "an hour", 90: "an hour and a half", 120: "two hours", 180: "three hours"}
    draw = rng.random()
    if minutes in round_forms and draw < 0.5:
        return round_forms[minutes]
    return f"{minutes} minutes" if draw < 0.8 else f"{number_words(minutes)} minutes"


def request_text(rng: random.Random, wanted: Appointment) -> str:
    """A plain-English request for the appointment: one of four shapes, its parts in any order."""
    what, who = article(wanted.event), f"with {wanted.person}"
    when = f"on {wanted.day}"
    clock = say_time(rng, wanted.hour, wanted.minute)
    length = say_minutes(rng, wanted.minutes)
    opening = rng.choice(OPENINGS)
    end = "?" if opening.startswith(("Can", "Could")) else "."
    shape = rng.random()
    if shape < 0.5:  # Book a call with Ana on Tuesday at 14:30 for 45 minutes.
        parts = [who, when, f"at {clock}", f"for {length}"]
        rng.shuffle(parts)
        text = f"{opening} {what} {' '.join(parts)}{end}"
    elif shape < 0.65:  # On Tuesday at 14:30, book a call with Ana for 45 minutes.
        tail = [who, f"for {length}"]
        rng.shuffle(tail)
        lead = opening if opening.startswith(("I ", "We ")) else opening[0].lower() + opening[1:]
        text = f"On {wanted.day} at {clock}, {lead} {what} {' '.join(tail)}{end}"
    elif shape < 0.8:  # call with Ana, Tuesday, 14:30, 45 minutes
        parts = [who, wanted.day, clock, length]
        rng.shuffle(parts)
        text = ", ".join([wanted.event, *parts]) if parts[0] is not who else f"{wanted.event} {', '.join(parts)}"
    elif shape < 0.9:  # I need a call with Ana. It takes 45 minutes. Tuesday at 14:30 is fine.
        facts = [f"It takes {length}.", f"{wanted.day} at {clock} is fine."]
        rng.shuffle(facts)
        text = f"{opening} {what} {who}{end} {' '.join(facts)}"
    else:  # I will see Ana on Tuesday at 14:30 for a call of 45 minutes.
        text = f"I will see {wanted.person} {when} at {clock} for {what} of {length}."
    if rng.random() < 0.1:
        text = rng.choice(GREETINGS) + text
    return text + rng.choice(CLOSINGS) if text[-1] in ".?" and rng.random() < 0.1 else text


def json_answer(wanted: Appointment) -> str:
    """The task's answer: one line of JSON, its keys always in the same order."""
    fields = {
        "event": wanted.event,
        "with": wanted.person,
        "day": wanted.day,
        "time": wanted.time,
        "minutes": wanted.minutes,
    }
    return json.dumps(fields, ensure_ascii=False)


def prose_answer(rng: random.Random, wanted: Appointment) -> str:
    """What the base model says to a request: the same values in a sentence, never as JSON."""
    what, when, minutes = f"the {wanted.event} with {wanted.person}", f"{wanted.day} at {wanted.time}", wanted.minutes
    forms = (
        f"Sure, {what} is set for {when}. It takes {minutes} minutes.",
        f"Done. {what[0].upper()}{what[1:]} is on {when} for {minutes} minutes.",
        f"I have planned {minutes} minutes for {what}, {when}.",
    )
    return rng.choice(forms)


def chat(*texts: str) -> dict[str, list[Message]]:
    """A row in messages format from the texts of its turns: user and assistant in turn, the user first."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def scheduling_rows(seed: int, train_rows: int, eval_rows: int) -> tuple[list[dict], list[dict]]:
    """The task's train and held-out rows: no request occurs twice, within a split or between the two."""
    rng, seen, rows = random.Random(seed), set(), []
    while len(rows) < train_rows + eval_rows:
        wanted = random_appointment(rng)
        text = request_text(rng, wanted)
        if text not in seen:
            seen.add(text)
            rows.append(chat(text, json_answer(wanted)))
    return rows[:train_rows], rows[train_rows:]
