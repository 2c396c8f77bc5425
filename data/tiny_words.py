"""Word lists of the synthetic corpus and of the scheduling task: all written for this project, no third-party text."""

# ruff: noqa: SIM905  (words in a row are easier to read and to extend than quoted ones)

import re

NAMES = (
    "Ana Ben Carla David Elena Farid Grace Hugo Ines Jonas Kira Liam Maya Noah Olga Paul Quinn Rosa Sami Tara Umar "
    "Vera Will Xenia Yara Zoe Amir Bella Chen Diana Emil Fiona Goran Hana Ivan Julia Karim Lena Marco Nina Oscar Petra "
    "Ravi Sofia Tomas Ursula Viktor Wanda Yusuf Zara Aiko Bruno Clara Dario Esra Felix Gita Henry Irena Jamal"
).split()
SURNAMES = "Novak Okafor Silva Tanaka Berg Costa Haddad Kumar Lopez Moreau Rossi Weber Young Park Singh Adams".split()
TEAMS = "design sales support finance research marketing legal product".split()

# Every event is a phrase that follows "a" or "an".
EVENTS = (
    "dentist appointment|call|meeting|team lunch|piano lesson|haircut|job interview|budget review|coffee chat|"
    "project update|training session|yoga class|doctor visit|phone call|video call|planning session|tennis match|"
    "birthday dinner|code review|guitar lesson|chess game|parent meeting|house tour|status meeting|design review|"
    "swimming lesson|product demo|lunch|dinner|breakfast|check-in|workshop|interview|photo shoot|vet visit|"
    "study group|book club|driving lesson|eye exam|board meeting|garden party|cooking class|bank appointment|"
    "dance class|movie night|sales pitch|walk|rehearsal"
).split("|")

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()

CITIES = "Paris Rome Oslo Lima Cairo Tokyo Berlin Madrid Dublin Vienna Lisbon Prague Athens Delhi Boston Quito".split()
COLOURS = "red blue green yellow black white brown pink grey purple orange silver".split()
ANIMALS = "cat dog horse rabbit parrot goat fish turtle hamster duck pony snake lizard sheep mouse owl".split()
FOODS = "apples pears plums grapes cherries rolls cakes beans eggs carrots onions lemons nuts figs dates leeks".split()
DISHES = "soup pasta salad stew curry omelette pancakes pizza risotto tacos noodles pie".split()
THINGS = (
    "lamp chair table pencil bottle bucket hammer ladder blanket candle mirror basket kettle carpet wallet jacket "
    "helmet camera ticket shovel brush drum bell rope tent scarf stamp needle button ruler"
).split()
JOBS = "baker nurse teacher driver farmer painter pilot cook singer writer doctor tailor waiter plumber lawyer".split()
ROOMS = "kitchen garden office garage hall library cellar studio attic lobby".split()
SPORTS = "tennis chess football rowing judo golf hockey running skating climbing".split()
WEATHER = "sunny rainy windy cloudy snowy foggy stormy mild".split()
SIZES = "small medium large tiny huge".split()
ADJECTIVES = "old new quiet loud soft heavy light clean dusty bright round strange gentle quick slow warm cold".split()
VERBS = "found sold moved painted lost cleaned bought carried dropped repaired borrowed hid".split()

# No other word of the corpus is made of these alone (that is why "me" is missing: "time", "name"): the tokenizer's
# training leaves made-up words out, so that they fall into small pieces.
SYLLABLES = (
    "ba be bi bo da de di do fa fi go ga ka ke ki ko la le li lo ma mi na ni no pa pi po ra ri ro sa se si so ta ti to "
    "va vi vo za zu lu mu nu ru su tu"
).split()

# Key words of the small JSON objects in the corpus, each with the kind of its value.
# The task's own key words are among them; the generator never lets an object hold more than two of those.
KEY_KINDS = {
    "name": "name", "owner": "name", "friend": "name", "author": "name", "guest": "name", "with": "name",
    "city": "city", "from": "city", "to": "city", "colour": "colour", "pet": "animal", "animal": "animal",
    "food": "food", "item": "thing", "gift": "thing", "dish": "dish", "job": "job", "room": "room", "sport": "sport",
    "weather": "weather", "size": "size", "day": "day", "deadline": "day", "month": "month", "event": "event",
    "title": "event", "time": "time", "opens": "time", "closes": "time", "minutes": "number", "age": "number",
    "count": "number", "price": "number", "seats": "number", "weight": "number", "page": "number", "code": "code",
}  # fmt: skip
TASK_KEYS = ("event", "with", "day", "time", "minutes")

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()


MADE_UP = re.compile(rf"\b(?:{'|'.join(SYLLABLES)}){{2,3}}\b")


def number_words(value: int) -> str:
    """English words from a whole number below 1000: 'forty-five', 'one hundred twenty'."""
    if value < 20:
        return ONES[value]
    if value < 100:
        return TENS[value // 10] + (f"-{ONES[value % 10]}" if value % 10 else "")
    rest = value % 100
    return f"{ONES[value // 100]} hundred" + (f" {number_words(rest)}" if rest else "")


def article(phrase: str) -> str:
    """'a phrase' or 'an phrase' by the first letter of the phrase."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase
