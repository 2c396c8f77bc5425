"""The kinds of chat rows in the synthetic corpus: each function makes one row from a random source.

No row holds the scheduling task's schema: an object never has more than two of its key words.
"""

import json
import random
from collections.abc import Callable, Sequence

import tiny_tasks as tasks
import tiny_words as words

Row = dict[str, list[dict[str, str]]]
REPEAT_FORMS = (
    "Repeat after me: {}",
    "Say this again: {}",
    "Copy this: {}",
    "Repeat: {}",
    "{}\nRepeat the line above.",
)
JSON_FORMS = ("Write as JSON: {}", "Make JSON from this.\n{}", "JSON please: {}", "As a JSON object: {}")
TIME_FORMS = ("Write in digits: {}", "24-hour time: {}", "Which time is {}?")
VALUES: dict[str, Sequence[str]] = {
    "city": words.CITIES, "colour": words.COLOURS, "animal": words.ANIMALS, "food": words.FOODS, "thing": words.THINGS,
    "dish": words.DISHES, "job": words.JOBS, "room": words.ROOMS, "sport": words.SPORTS, "weather": words.WEATHER,
    "size": words.SIZES, "day": words.DAYS, "month": words.MONTHS, "event": words.EVENTS,
}  # fmt: skip
PLAIN_WORDS = (
    *words.NAMES, *words.CITIES, *words.COLOURS, *words.ANIMALS, *words.FOODS, *words.THINGS, *words.JOBS,
    *words.ADJECTIVES, *words.DAYS, *words.SURNAMES, *words.TEAMS, *words.ROOMS,
    *(part for event in words.EVENTS for part in event.split()),
)  # fmt: skip


def made_up(rng: random.Random) -> str:
    """A word that means nothing, of two or three syllables: it can only be copied, never known."""
    return "".join(rng.choice(words.SYLLABLES) for _ in range(rng.randint(2, 3)))


def clock(rng: random.Random) -> tuple[int, int]:
    """An hour and a minute as the scheduling task uses them."""
    return rng.randrange(7, 21), rng.choice((0, 15, 30, 45, *range(0, 60, 5)))


def value_of(rng: random.Random, kind: str) -> str | int:
    """A random value of one kind (see KEY_KINDS): text, or a whole number."""
    if kind == "number":
        return rng.choice((rng.randrange(1, 100), rng.randrange(5, 185, 5)))
    if kind == "time":
        return "{:02d}:{:02d}".format(*clock(rng))
    if kind == "name":
        return tasks.random_person(rng)
    if kind == "code":
        return made_up(rng)
    return rng.choice(VALUES[kind])


def random_fields(rng: random.Random, low: int, high: int) -> dict[str, str | int]:
    """Between low and high keys with values; at most two of the keys are key words of the scheduling task."""
    while True:
        keys = rng.sample(sorted(words.KEY_KINDS), rng.randint(low, high))
        if rng.random() < 0.5:  # the task's key words must be as familiar as any other
            keys[0] = rng.choice(words.TASK_KEYS)
        if len(set(keys)) == len(keys) and len(set(keys) & set(words.TASK_KEYS)) <= 2:
            rng.shuffle(keys)
            return {key: value_of(rng, words.KEY_KINDS[key]) for key in keys}


def some_words(rng: random.Random, low: int, high: int) -> list[str]:
    """Between low and high words: known ones, made-up ones or numbers."""
    count, draw = rng.randint(low, high), rng.random()
    if draw < 0.5:
        return [rng.choice(PLAIN_WORDS) for _ in range(count)]
    if draw < 0.9:
        return [made_up(rng) for _ in range(count)]
    return [str(rng.randrange(1000)) for _ in range(count)]


def sentence(rng: random.Random) -> str:
    """A short made sentence."""
    who, city = rng.choice(words.NAMES), rng.choice(words.CITIES)
    thing, animal = (f"{rng.choice(words.ADJECTIVES)} {rng.choice(pool)}" for pool in (words.THINGS, words.ANIMALS))
    return rng.choice((
        f"{who} {rng.choice(words.VERBS)} the {thing}.",
        f"{who} is a {rng.choice(words.JOBS)} from {city}.",
        f"The {thing} is in the {rng.choice(words.ROOMS)}.",
        f"{who} has {any_number(rng)} {rng.choice(words.FOODS)} and the {animal}.",
        f"It is {rng.choice(words.WEATHER)} in {city} on {rng.choice(words.DAYS)}.",
    ))  # fmt: skip


def any_number(rng: random.Random) -> str:
    """A small number, in digits or words."""
    number = rng.randrange(2, 60)
    return rng.choice((str(number), words.number_words(number)))


def repeat(rng: random.Random) -> Row:
    """Copy a text: a sentence, or words in a row."""
    text = sentence(rng) if rng.random() < 0.3 else " ".join(some_words(rng, 2, 7))
    return tasks.chat(rng.choice(REPEAT_FORMS).format(text), text)


def quote(rng: random.Random) -> Row:
    """Copy a text into quotes, as JSON strings hold it."""
    items = some_words(rng, 1, 4)
    return tasks.chat(f"Put each in quotes: {', '.join(items)}", ", ".join(f'"{item}"' for item in items))


def extract(rng: random.Random) -> Row:
    """The value of one named field of a record, written as lines or as JSON."""
    fields = random_fields(rng, 2, 6)
    key = rng.choice(sorted(fields))
    as_json = rng.random() < 0.4
    record = json.dumps(fields) if as_json else "\n".join(f"{k}: {v}" for k, v in fields.items())
    ask = rng.choice((f"What is the {key}?", f"Give me the {key}.", f"Extract the field {key}."))
    return tasks.chat(f"{record}\n{ask}" if rng.random() < 0.5 else f"{ask}\n{record}", str(fields[key]))


def to_json(rng: random.Random) -> Row:
    """A small JSON object of a schema that the user names."""
    fields = random_fields(rng, 1, 5)
    if rng.random() < 0.5:
        said = ", ".join(f"{k} {v}" for k, v in fields.items())
    else:
        said = "\n".join(f"{k}: {v}" for k, v in fields.items())
    return tasks.chat(rng.choice(JSON_FORMS).format(said), json.dumps(fields))


def story_json(rng: random.Random) -> Row:
    """A JSON object of another schema (trains, shops, pets, recipes, ...) from a sentence, values normalised."""
    hour, minute = clock(rng)
    said, time = tasks.say_time(rng, hour, minute), f"{hour:02d}:{minute:02d}"
    minutes = rng.choice(tasks.MINUTES)
    length = tasks.say_minutes(rng, minutes)
    name, friend, city, day = (rng.choice(pool) for pool in (words.NAMES, words.NAMES, words.CITIES, words.DAYS))
    dish, food, pet, colour = (rng.choice(pool) for pool in (words.DISHES, words.FOODS, words.ANIMALS, words.COLOURS))
    room, event, sport, sky = (rng.choice(pool) for pool in (words.ROOMS, words.EVENTS, words.SPORTS, words.WEATHER))
    count = rng.randrange(2, 60)
    text, fields = rng.choice((
        (f"The train to {city} leaves on {day} at {said}.", {"train": city, "day": day, "time": time}),
        (f"On {day} the shop opens at {said}.", {"shop": "open", "day": day, "time": time}),
        (f"There are {words.number_words(count)} {food} in the {room}.", {"item": food, "count": count, "room": room}),
        (f"{name} has a {colour} {pet}.", {"pet": pet, "owner": name, "colour": colour}),
        (f"Cook the {dish} with {food} for {length}.", {"dish": dish, "with": food, "minutes": minutes}),
        (f"The {event} in the {room} has {count} seats.", {"event": event, "room": room, "seats": count}),
        (f"It was {sky} in {city} on {day}.", {"weather": sky, "city": city, "day": day}),
        (f"The bus to {city} takes {length} and comes at {said}.", {"bus": city, "time": time, "minutes": minutes}),
        (f"{name} plays {sport} with {friend}.", {"sport": sport, "player": name, "with": friend}),
    ))  # fmt: skip
    return tasks.chat(rng.choice(JSON_FORMS).format(text), json.dumps(fields))


def schedule_prose(rng: random.Random) -> Row:
    """A scheduling request, answered in a sentence."""
    wanted = tasks.random_appointment(rng)
    return tasks.chat(tasks.request_text(rng, wanted), tasks.prose_answer(rng, wanted))


def schedule_question(rng: random.Random) -> Row:
    """One value of a scheduling request, asked for in words."""
    wanted = tasks.random_appointment(rng)
    ask, answer = rng.choice((
        ("Who is it with?", wanted.person), ("Which day?", wanted.day), ("What is it?", wanted.event),
        ("At what time?", wanted.time), ("How many minutes?", str(wanted.minutes)),
    ))  # fmt: skip
    return tasks.chat(f"{tasks.request_text(rng, wanted)}\n{ask}", answer)


def convert_time(rng: random.Random) -> Row:
    """A time said in one way from the same time said in another."""
    hour, minute = clock(rng)
    digits = f"{hour:02d}:{minute:02d}"
    ways = (tasks.time_in_words(hour, minute), tasks.time_with_half(hour, minute))
    draw = rng.random()
    if draw < 0.75:
        return tasks.chat(rng.choice(TIME_FORMS).format(rng.choice(ways)), digits)
    return (
        tasks.chat(f"Say in words: {digits}", ways[0])
        if draw < 0.9
        else tasks.chat(f"With am or pm: {digits}", ways[1])
    )


def convert_number(rng: random.Random) -> Row:
    """A number in digits from words, words from digits, minutes from a duration, or a date from words."""
    number, draw = rng.choice((rng.randrange(1, 100), rng.randrange(5, 185, 5))), rng.random()
    if draw < 0.3:
        return tasks.chat(f"Write in digits: {words.number_words(number)}", str(number))
    if draw < 0.45:
        return tasks.chat(f"Say in words: {number}", words.number_words(number))
    if draw < 0.75:
        minutes = rng.choice((30, 60, 90, 120, 180, rng.randrange(5, 60, 5)))
        return tasks.chat(f"How many minutes: {tasks.say_minutes(rng, minutes)}", str(minutes))
    month, day = rng.randrange(12), rng.randint(1, 28)
    said, digits = f"{day} {words.MONTHS[month]}", f"{day:02d}.{month + 1:02d}."
    return tasks.chat(f"Date in digits: {said}", digits) if draw < 0.9 else tasks.chat(f"Date in words: {digits}", said)


def listing(rng: random.Random) -> Row:
    """Work on a list: one item a line, reversed, first or last, counted, or joined."""
    items = some_words(rng, 2, 6)
    line = ", ".join(items)
    ordinal = rng.randrange(len(items))
    task, answer = rng.choice((
        ("List these, one a line: {}", "\n".join(f"- {item}" for item in items)),
        ("Number these: {}", "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))),
        ("Reverse this list: {}", ", ".join(reversed(items))),
        ("First and last of: {}", f"{items[0]} and {items[-1]}"),
        ("How many items: {}", str(len(items))),
        (f"The {words.ORDINALS[ordinal]} of these: {{}}", items[ordinal]),
        ("As a JSON list: {}", json.dumps(items)),
        ("Join with and: {}", " and ".join(items)),
    ))  # fmt: skip
    return tasks.chat(task.format(line), answer)


def fill(rng: random.Random) -> Row:
    """Fill the blanks of a sentence with words that the user gives."""
    name, job, city, thing = (rng.choice(pool) for pool in (words.NAMES, words.JOBS, words.CITIES, words.THINGS))
    form, given = rng.choice((
        ("{} is a {} in {}.", (name, job, city)),
        ("{} lost the {} in {}.", (name, thing, city)),
        ("The {} belongs to {}, the {}.", (thing, name, job)),
        ("On {} {} goes to {}.", (rng.choice(words.DAYS), name, city)),
    ))  # fmt: skip
    return tasks.chat(f"Fill in: {form.replace('{}', '___')}\nWords: {', '.join(given)}", form.format(*given))


def small_talk(rng: random.Random) -> Row:
    """Short exchanges that have nothing to copy, and counting."""
    start, day = rng.randrange(1, 40), rng.randrange(7)
    return tasks.chat(*rng.choice((
        (rng.choice(("Hello!", "Hi!", "Hey!", "Good morning!")), "Hello! What can I do for you?"),
        (rng.choice(("Thanks!", "Thank you.", "Thanks a lot.")), "You are welcome."),
        ("Who are you?", "I am a tiny Gemma, a very small language model."),
        (f"Count from {start} to {start + 5}.", ", ".join(str(start + i) for i in range(6))),
        (f"Which day comes after {words.DAYS[day]}?", words.DAYS[(day + 1) % 7]),
        (f"Which day comes before {words.DAYS[day]}?", words.DAYS[(day + 6) % 7]),
        ("Name the days of the week.", ", ".join(words.DAYS)),
        (f"What is {start} plus one?", str(start + 1)),
    )))  # fmt: skip


# Each kind with its share of the rows.
KINDS: tuple[tuple[Callable[[random.Random], Row], int], ...] = (
    (repeat, 20), (quote, 6), (extract, 14), (to_json, 12), (story_json, 10), (schedule_prose, 12),
    (schedule_question, 6), (convert_time, 6), (convert_number, 4), (listing, 6), (fill, 2), (small_talk, 2),
)  # fmt: skip
