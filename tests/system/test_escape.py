"""What a model may send to a terminal: text, line breaks and tabs."""

from __future__ import annotations

import itertools
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_ft.system.escape import EscapeStripper, printable

PIECES = [
    "\x1b",
    "[",
    "]",
    "P",
    "\\",
    "0;31",
    "m",
    ";",
    "\x07",
    "\x9b",
    "\x9d",
    "\x9c",
    "\n",
    "a",
    "é",
    "\u202e",
    "(B",
    "\r",
]
NOISE = st.lists(st.sampled_from(PIECES) | st.characters(codec="utf-8"), max_size=30)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, é, 漢字, 😀\tand\nlines", "plain, é, 漢字, 😀\tand\nlines"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b[2J\x1b[1;1Hgone", "gone"),
        ("\x1b[?1049h\x1b[>4;2mx", "x"),
        ("\x9b31mred", "red"),
        ("\x1b]0;title\x07after", "after"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b]52;c;aGk=\x9cafter", "after"),
        ("\x9d0;title\x07after", "after"),
        ("\x1bP1$r0m\x1b\\x\x1b_app\x1b\\y\x1b^pm\x1b\\z\x1bXsos\x1b\\", "xyz"),
        ("\x1b(Bcharset\x1b#8screen\x1bcreset", "charsetscreenreset"),
        ("over\rwritten\b\b\x07\x00\x7f\x85", "overwritten"),
        ("\x1b]0;never closed\nnext line", "\nnext line"),
        ("\x1b[31\nnext line", "\nnext line"),
        ("\x1b[3\u00e9broken off", "\u00e9broken off"),
        ("\x1b]0;cancelled\x18text", "text"),
        ("\x1b]0;a\x1b[31mb", "b"),
        ("\x1b\x1b[31mtwice", "twice"),
        ("\u202egnp.exe\u202c \u2066isolate\u2069", "gnp.exe isolate"),
        ("שלום \u200fweak marks stay", "שלום \u200fweak marks stay"),
        ("at the end \x1b[", "at the end "),
    ],
)  # fmt: skip
def test_what_is_shown(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(NOISE, st.data())
def test_pieces_do_not_matter(parts: list[str], data: st.DataObject) -> None:
    """Wherever the text is cut, the same is shown."""
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    stripper = EscapeStripper()
    bounds = [0, *cuts, len(text)]
    fed = "".join(stripper.feed(text[start:end]) for start, end in itertools.pairwise(bounds))
    assert fed == printable(text)


@given(NOISE)
def test_no_control_ever_passes(parts: list[str]) -> None:
    shown = printable("".join(parts))
    assert [sign for sign in shown if unicodedata.category(sign) == "Cc" and sign not in "\n\t"] == []
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cf"])))
def test_text_without_control_passes_whole(text: str) -> None:
    assert printable(text) == text
