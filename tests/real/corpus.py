"""Some 4,200 varied texts, made by code and always the same: what a tokenizer meets in prose, code, tables, noise."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Iterator

SPACE_SIGN = "\u2581"
# One sentence in many languages: (its words, joined by a blank where the language writes one).
SENTENCES = (
    "The quick meeting about the new bridge begins at nine.",
    "Das Treffen über die neue Brücke fängt um neun Uhr an, nicht später!",
    "La réunion à propos du pont commencera à neuf heures, n'est-ce pas ?",
    "¿Cuándo empieza la reunión sobre el puente? Mañana, a las nueve.",
    "A reunião sobre a ponte começa amanhã às nove horas.",
    "Совещание о новом мосте начнётся завтра в девять часов.",
    "Нарада щодо нового мосту почнеться о дев'ятій ранку.",
    "Spotkanie w sprawie mostu zaczyna się jutro o dziewiątej.",
    "Schůze o novém mostě začíná zítra v devět hodin.",
    "Yeni köprü hakkındaki toplantı yarın saat dokuzda başlıyor.",
    "Η συνάντηση για τη νέα γέφυρα αρχίζει αύριο στις εννέα.",
    "הפגישה על הגשר החדש מתחילה מחר בתשע בבוקר.",
    "يبدأ الاجتماع حول الجسر الجديد غدًا في الساعة التاسعة.",
    "جلسه درباره پل تازه فردا ساعت نه آغاز می‌شود.",
    "नए पुल पर बैठक कल सुबह नौ बजे शुरू होगी।",
    "নতুন সেতু নিয়ে সভা আগামীকাল সকাল নয়টায় শুরু হবে।",
    "புதிய பாலம் பற்றிய கூட்டம் நாளை காலை ஒன்பது மணிக்கு.",
    "การประชุมเรื่องสะพานใหม่เริ่มพรุ่งนี้เก้าโมงเช้า",
    "Cuộc họp về cây cầu mới bắt đầu lúc chín giờ sáng mai.",
    "关于新桥的会议明天上午九点开始。",
    "新しい橋についての会議は明日の朝九時に始まります。",
    "새 다리에 관한 회의는 내일 아침 아홉 시에 시작합니다.",
    "Շինարարության ժողովը կսկսվի վաղը ժամը իննին։",
    "შეხვედრა ახალი ხიდის შესახებ ხვალ ცხრა საათზე დაიწყება.",
    "Mkutano kuhusu daraja jipya unaanza kesho saa tatu asubuhi.",
    "Kokous uudesta sillasta alkaa huomenna kello yhdeksän.",
)
CONTROL = (
    "<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]", "<unused0>", "<unused98>", "<start_of_turn>",
    "<end_of_turn>", "<start_of_image>", "[toxicity=0]",
)  # fmt: skip
OTHERS_CONTROL = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "[INST]", "[/INST]", "<|eot_id|>", "<start_of_turn",
    "start_of_turn>", "< start_of_turn>", "<start_of_turn >", "<Start_of_turn>", "<end_of_turn>>", "<unused99>",
    "<unused100>", "<0x0A>", "<0x09>", "<0xff>", "<0x0a>", "<0x0A", "[PAD]", "<PRE>",
)  # fmt: skip
# Without <s>: llama.cpp takes its end for the end of an answer, and the lines with it are few and fixed.
TAGS = (
    "table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote",
    "strong", "em", "b", "i", "u", "sub", "sup", "code", "p", "ul", "li", "div", "span",
)  # fmt: skip
CODE = (
    "def {a}({b}, *, {c}=None):", "    return {a}({b})[{n}:]  # {c}", "for (int {b} = 0; {b} < {n}; ++{b}) {{",
    "\tif err != nil {{\n\t\treturn {a}, err\n\t}}", "SELECT {a}, COUNT(*) FROM {b} WHERE {c} >= {n} GROUP BY 1;",
    "const {a} = async ({b}) => {{ await {c}({b}?.{a} ?? {n}); }};", "fn {a}<'a>({b}: &'a str) -> Option<&'a [u8]> {{",
    "#include <{a}.h>", "$ {a} --{b}={n} | grep -v '{c}' > {a}.txt 2>&1", "{a}: {{{b}: [{n}, {n}], {c}: null}}",
    "x = {n}e-{n} * {a}**2 // {b} % {c} ^ ~{n}", "        {a}->{b}::{c}(&{a}, {n});", "@{a}.{b}('/{c}/<int:{b}>')",
    "\\begin{{{a}}} \\frac{{{b}}}{{{c}}} \\end{{{a}}}", "- [ ] {a}: `{b}` **{c}** _{a}_ ~~{b}~~ [{c}](#{a})",
    "https://{a}.example/{b}/{c}?q={n}&r=%20{a}#{b}", "{a}@{b}.example", "0x{n}f00 0b1010 0o17 1_000_{n} {n}.{n}f",
)  # fmt: skip
BLOCKS = (
    (0x00A1, 0x024F), (0x0250, 0x02FF), (0x0300, 0x036F), (0x0370, 0x03FF), (0x0400, 0x052F), (0x0590, 0x05FF),
    (0x0600, 0x06FF), (0x0900, 0x097F), (0x0E00, 0x0E7F), (0x1E00, 0x1EFF), (0x2000, 0x206F), (0x20A0, 0x20CF),
    (0x2190, 0x22FF), (0x2500, 0x2580), (0x2582, 0x27BF), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3),
    (0xE000, 0xE0FF), (0xFB00, 0xFDFF), (0xFE00, 0xFFFD), (0x10300, 0x1034F), (0x12000, 0x123FF), (0x1D400, 0x1D7FF),
    (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF), (0xE0000, 0xE007F), (0x10FF00, 0x10FFFD),
)  # fmt: skip
PARTS_OF_ONE = (
    "\U0001f469\u200d\U0001f680", "\U0001f44d\U0001f3fd", "\U0001f1fa\U0001f1e6", "e\u0301", "\u200b", "\u200f",
    "\ufeff", "\u00a0", "\u3000", "\u2028", "\x00", "\x7f", "\x1b[0m", "\r\n", "\r", "\x0b", "\x0c",
)  # fmt: skip


def lines() -> list[str]:
    """The corpus, with no text twice. Runs of U+2581 and `</s>` are in it: `has_sign_run`, `STRIKE_END`."""
    chance = random.Random(20261127)
    made = [text for maker, count in MAKERS for text in _several(maker, count, chance)]
    return list(dict.fromkeys([*made, *_fixed()]))


STRIKE_END = "</s>"


def has_sign_run(text: str) -> bool:
    """Whether a text holds U+2581 beside another one or beside a blank: then it decodes to blanks all the same."""
    return any(pair in text for pair in (SPACE_SIGN * 2, SPACE_SIGN + " ", " " + SPACE_SIGN))


def spells_control(text: str) -> bool:
    """Whether a control token of a Gemma is spelt in a text: transformers makes the token of it, training never."""
    return any(name in text for name in CONTROL) or "<unused" in text


def _several(maker: Callable[[random.Random], str], count: int, chance: random.Random) -> Iterator[str]:
    return (maker(chance) for _ in range(count))


def _word(chance: random.Random) -> str:
    style = chance.randrange(5)
    letters = "".join(chance.choices(string.ascii_lowercase, k=chance.randint(1, 9)))
    return (letters, letters.title(), letters.upper(), f"{letters}_{letters[:3]}", f"{letters}{letters[:4].title()}")[
        style
    ]


def _prose(chance: random.Random) -> str:
    """A few sentences, cut and joined anywhere."""
    text = chance.choice((" ", "  ", "\n", "\n\n", "")).join(chance.sample(SENTENCES, chance.randint(1, 4)))
    begin = chance.randrange(8) * chance.randrange(2)
    return text[begin : len(text) - chance.randrange(6)]


def _mixed_words(chance: random.Random) -> str:
    words = [word for sentence in chance.sample(SENTENCES, 3) for word in sentence.split(" ")]
    chance.shuffle(words)
    return " ".join([*words[:6], _word(chance), *words[6:9]])


def _code(chance: random.Random) -> str:
    def line() -> str:
        indent = chance.choice(("", "  ", "    ", "\t", "\t\t", " " * chance.randint(0, 40)))
        names = {"a": _word(chance), "b": _word(chance), "c": _word(chance), "n": chance.randint(0, 99999)}
        return indent + chance.choice(CODE).format(**names)

    return "\n".join(line() for _ in range(chance.randint(1, 4)))


def _table(chance: random.Random) -> str:
    """Rows whose columns are filled up with blanks, or split by tabs, commas or bars."""
    width, between = chance.randint(1, 45), chance.choice((" ", "\t", ",", " | ", "|", ";\t"))
    cells = [[_word(chance) for _ in range(chance.randint(2, 5))] for _ in range(chance.randint(1, 3))]
    pad = chance.choice((str.ljust, str.rjust, lambda text, _: text))
    return "\n".join(between.join(pad(cell, width) for cell in row) for row in cells)


def _digits(chance: random.Random) -> str:
    number = chance.randrange(10 ** chance.randint(1, 18))
    forms = (
        f"{number}", f"{number:,}", f"-{number / 7:.3f}", f"{number % 24:02}:{number % 60:02}", f"{number:#x}",
        f"{number % 9000}-{number % 12 + 1:02}-{number % 28 + 1:02}", f"${number / 100:,.2f}", f"+{number} ({number}%)",
    )  # fmt: skip
    return " ".join(chance.sample(forms, chance.randint(1, 4)))


def _blanks(chance: random.Random) -> str:
    """Runs of spaces, tabs and line breaks of each length up to 100, between words or alone."""
    runs = [chance.choice(" \t\n") * chance.randint(1, 100) for _ in range(chance.randint(1, 4))]
    words = [chance.choice(("", "a", "b", "x = 1", "漢", "<b>", "\r", "1")) for _ in range(len(runs) + 1)]
    return words[0] + "".join(run + word for run, word in zip(runs, words[1:], strict=True))


def _repeats(chance: random.Random) -> str:
    """A short unit again and again, whole and cut, behind something else: pieces of it overlap."""
    units = (
        "=",
        "-",
        ".",
        "!",
        "?",
        "a",
        "ha",
        "ab",
        "aab",
        "0",
        "_",
        "*",
        "/",
        "#",
        "~",
        "…",
        "哈",
        "ー",
        "на",
        "-=",
        "<>",
        "()",
    )
    unit = chance.choice(units)
    run = (unit * chance.randint(2, 90))[chance.randrange(2) :]
    return chance.choice(("", " ", "b", "a", "-", "\n")) + run + chance.choice(("", " ", "b", unit[:1] + "c", "."))


def _look_alikes(chance: random.Random) -> str:
    names = [chance.choice((*CONTROL, *OTHERS_CONTROL)) for _ in range(chance.randint(1, 4))]
    return "".join(name + chance.choice(("", " ", "\n", "user\n", "x", "_")) for name in names)


def _html(chance: random.Random) -> str:
    def element(depth: int) -> str:
        tag = chance.choice(TAGS)
        inner = element(depth - 1) if depth else chance.choice(SENTENCES)[: chance.randint(0, 30)]
        return f"<{tag}{chance.choice(('', '', ' id=1'))}>{inner}</{tag}>" + chance.choice(("", "\n", "<br/>", "  "))

    return element(chance.randint(0, 4))


def _json(chance: random.Random) -> str:
    value = {
        _word(chance): chance.choice((_word(chance), chance.randint(-99, 99), None, True, [1.5, ""])) for _ in range(3)
    }
    return json.dumps(value, indent=chance.choice((None, 1, 2, 4)), ensure_ascii=chance.random() < 0.5)


def _characters(chance: random.Random) -> str:
    """Characters of one or two blocks of Unicode, most of them in no vocabulary."""
    chosen = chance.sample(BLOCKS, chance.randint(1, 2))
    made = [chr(chance.randint(*chance.choice(chosen))) for _ in range(chance.randint(1, 12))]
    return "".join(one + chance.choice(("", "", " ")) for one in made if not 0xD800 <= ord(one) <= 0xDFFF)


def _parts(chance: random.Random) -> str:
    return "".join(
        chance.choice(PARTS_OF_ONE) + chance.choice(("", "a", " ", "漢")) for _ in range(chance.randint(1, 5))
    )


def _noise(chance: random.Random) -> str:
    return "".join(chance.choices(string.printable, k=chance.randint(1, 60)))


def _sign(chance: random.Random) -> str:
    return "".join(chance.choice((SPACE_SIGN, SPACE_SIGN, "a", " ", "b c")) for _ in range(chance.randint(1, 9)))


MAKERS: tuple[tuple[Callable[[random.Random], str], int], ...] = (
    (_prose, 400), (_mixed_words, 250), (_code, 400), (_table, 300), (_digits, 250), (_blanks, 400), (_repeats, 300),
    (_look_alikes, 200), (_html, 200), (_json, 150), (_characters, 300), (_parts, 100), (_noise, 250), (_sign, 60),
)  # fmt: skip


def _fixed() -> list[str]:
    """What must be in it however the rest falls out."""
    runs = [blank * count for blank in " \t\n" for count in range(1, 70)]
    tags = [f"<{slash}{tag}>" for tag in (*TAGS, "s") for slash in ("", "/")]
    return [
        "", *SENTENCES, *CONTROL, *OTHERS_CONTROL, *runs, *(f"a{run}b" for run in runs), *tags, "x<s>y</s>z",
        *(chr(code) for code in range(256)),
    ]  # fmt: skip
