"""Text that is damaged, or in another script than the rest: found by its characters, no language is guessed.

Source: the Unicode standard, chapters 2.14 and 23 (replacement character, control codes, private use).
"""

import re
import unicodedata
from collections import Counter

REPLACEMENT = "\ufffd"
# All but tab, LF and CR; with C1, a byte order mark inside text, and what turns the direction of writing around.
CONTROL = re.compile("[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\u202d\u202e]")
PRIVATE_USE = re.compile("[\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd]")
# Bytes 80 to BF, as Windows-1252 and Latin-1 show them: the later bytes of a character in UTF-8.
LATER = "[\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]"
MOJIBAKE = re.compile(
    f"Â[\xa0-\xbf]|Ã{LATER}"  # Latin-1: Ã© for é
    f"|â{LATER}{{2}}|ð{LATER}{{3}}"  # punctuation and signs, emoji: â€™ for ’
    f"|(?:[Ä-ß]{LATER}){{3}}|(?:[à-ï]{LATER}{{2}}){{2}}"  # a word of another alphabet; a single pair could be meant
)
SCRIPT_SAMPLE = 2000  # characters of a row that decide on its script
FEWEST_LETTERS = 10
LATIN = "LATIN"
ONE_SCRIPT = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "IDEOGRAPHIC": "CJK"}  # Japanese is written in several


def damage(text: str) -> list[str]:
    """The kinds of damage in a text: "replacement_character", "mojibake", "control_character", "private_use"."""
    kinds = ["control_character"] if CONTROL.search(text) else []
    if text.isascii():
        return kinds
    if REPLACEMENT in text:
        kinds.append("replacement_character")
    if MOJIBAKE.search(text):
        kinds.append("mojibake")
    if PRIVATE_USE.search(text):
        kinds.append("private_use")
    return kinds


def script(text: str) -> str | None:
    """The script of most letters, by the first word of their Unicode names ("LATIN", "CYRILLIC", "CJK", ...); None for
    a text with hardly any letters.
    """
    sample = text[:SCRIPT_SAMPLE]
    letters = Counter(filter(str.isalpha, sample))
    if letters.total() < FEWEST_LETTERS:
        return None
    if sample.isascii():
        return LATIN
    scripts: Counter[str] = Counter()
    for letter, count in letters.items():
        name = unicodedata.name(letter, "").partition(" ")[0]
        scripts[ONE_SCRIPT.get(name, name)] += count
    return scripts.most_common(1)[0][0]
