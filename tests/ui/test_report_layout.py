"""What can be read of a page in windows of any width: its tables and its pictures."""

from __future__ import annotations

import re
from pathlib import Path

from gemma_ft.ui.pages.comparison import write_comparison
from gemma_ft.ui.pages.curves import SMALL, WIDE
from tests.ui.test_report import EVALUATION, Seen, make_run, measured, seen


def widths(page: Seen) -> dict[str, float]:
    """Of each picture, by what it shows: how many points its page is wide."""
    names = [str(attributes["alt"]) for tag, attributes in page.tags if tag == "img"]
    found = [re.search(r'width="([\d.]+)pt"', picture) for picture in page.pictures]
    return {name: float(match[1]) for name, match in zip(names, found, strict=True) if match}


def rule(style: str, selector: str) -> str:
    """What the style says first of a selector."""
    match = re.search(rf"^\s*{re.escape(selector)} {{([^}}]*)}}", style, re.MULTILINE)
    assert match, selector
    return match[1]


def test_labels_can_be_read_in_a_narrow_window(finished_run: Path, tmp_path: Path) -> None:
    """Labels have 9 points. Wide pictures have a least width, and are scrolled; small ones lie under one another, in a
    phone of 375 pixels on 335 of them.
    """
    run = make_run(finished_run, tmp_path)
    page = seen(run)
    html = (run / "report.html").read_text(encoding="utf-8")
    least = re.search(r"min-width: ([\d.]+)rem", rule(html, ".wide img"))
    assert least
    small = {"Learning rate by step", "Tokens per second by step"}
    for name, points in widths(page).items():
        pixels = 335 if name in small else float(least[1]) * 16
        assert 9 / points * pixels >= 9.5, name
    assert small <= set(widths(page))
    assert "overflow-x: auto" in rule(html, ".wide")
    assert "display: grid" in rule(html, ".pictures")
    assert "min(17rem, 100%)" in rule(html, ".pictures")
    outside = re.findall(r"(?<!<div class=\"wide\">)<img", html.split('class="pictures"')[0])
    assert outside == []


def test_small_pictures_are_side_by_side_in_a_wide_window() -> None:
    """Three of them, and their gaps, as wide as the page; a wide one alone."""
    assert 3 * SMALL <= WIDE + 0.2


def test_words_of_a_table_are_whole(finished_run: Path, tmp_path: Path) -> None:
    """A column is as wide as its longest word: overflow-wrap's `anywhere` would let each be one letter wide, which CSS
    Text 3 counts for the least width and `break-word` does not. Long names alone are broken, and long values.
    """
    name = "a-very-long-name-" * 5
    one = make_run(finished_run, tmp_path, "eval.max_new_tokens=3", name=name)
    two = make_run(finished_run, tmp_path, "eval.max_new_tokens=4", name="two")
    measured(finished_run, one, merge=None)
    html = write_comparison([one, two], tmp_path / "out.html").read_text(encoding="utf-8")
    assert "overflow-wrap: break-word" in rule(html, "th, td")
    for selector in re.findall(r"^([^{}@]*\b(?:t[hd]|table)\b[^{}]*){[^}]*anywhere", html, re.MULTILINE):
        raise AssertionError(selector)
    assert "<td>eval.max_new_tokens</td>" in html
    assert f'<td class="long">{name}: adapter</td>' in html
    assert html.count('class="long"') == len(EVALUATION["models"])
    assert '<table class="prose">' in html
    assert '<table class="figures">' in html
