"""Pieces of text: joined they are the tokenizer's own decoding, and a stop string never shows."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gemma_ft.data.encode.tokenizer import ContentEncoder, load_tokenizer
from gemma_ft.infer.detokenize import TextStream
from gemma_ft.system.shipped import locate

LAW = settings(max_examples=150, deadline=None, derandomize=True)


@cache
def tokenizer() -> Any:
    return load_tokenizer(str(locate("data/gemma-tiny")))


@cache
def content() -> ContentEncoder:
    return ContentEncoder(tokenizer())


def byte(value: int) -> int:
    """The id of the token that stands for one byte."""
    return int(tokenizer().convert_tokens_to_ids(f"<0x{value:02X}>"))


def pieces(ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """What a stream gives for each id and at the end, and whether it was stopped."""
    stream = TextStream(tokenizer(), stop)
    return [*(stream.push(token) for token in ids), stream.end()], stream.stopped


IDS = st.lists(st.integers(0, 2047) | st.integers(byte(0), byte(255)), max_size=24)


@LAW
@given(IDS)
@example([byte(b) for b in "🙂".encode()] + [byte(0xFF)])  # one byte more, and the whole run is not UTF-8
@example([byte(0xF0), byte(0x9F), 500])
def test_joined_pieces_equal_the_tokenizers_decoding_of_any_ids(ids: list[int]) -> None:
    assert "".join(pieces(ids)[0]) == tokenizer().decode(ids, skip_special_tokens=False)


@LAW
@given(st.text(max_size=30))
@example("  two blanks before, emoji 🙂🙃 and\n\n\na break  ")
@example(" .,! 's n't")
def test_joined_pieces_equal_the_text_that_was_encoded(text: str) -> None:
    assert "".join(pieces(content().encode(text))[0]) == text.replace("\u2581", " ")


def test_a_character_of_several_bytes_comes_whole() -> None:
    ids = content().encode("a 🙂 b")
    shown = [piece for piece in pieces(ids)[0] if piece]
    assert "�" not in "".join(shown)
    assert sum("🙂" in piece for piece in shown) == 1
    assert len(shown) > 2, "the rest comes as it is made"


def test_half_a_character_at_the_end_is_shown_as_what_it_is() -> None:
    given_, _ = pieces([500, byte(0xF0), byte(0x9F)])
    assert given_[1:3] == ["", ""]
    assert given_[3] == "��"


STOPS = st.lists(st.text(st.sampled_from("ab \n🙂"), min_size=1, max_size=4), max_size=3)


@LAW
@given(st.text(st.sampled_from("ab c\n🙂"), max_size=30), STOPS)
@example("aab", ["aab", "ab"])
@example("abab", ["abac", "bab"])
def test_text_ends_where_the_first_complete_stop_string_begins(text: str, stops: list[str]) -> None:
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    shown, stopped = pieces(content().encode(text), tuple(stops))
    assert stopped == bool(ends)
    assert "".join(shown) == (text[: min(ends)[1]] if ends else text)


def test_the_stop_string_that_is_complete_first_counts_even_inside_one_token() -> None:
    ids = content().encode("a design review")
    assert tokenizer().decode(ids[-1:]) == " review"
    assert "".join(pieces(ids, (" review", "ev"))[0]) == "a design r"


def test_no_piece_shows_the_beginning_of_a_stop_string() -> None:
    stream = TextStream(tokenizer(), ["END.", "\n\nUser"])
    shown = ""
    for token in content().encode("The END is near. EN, and END. Never shown."):
        shown += stream.push(token)
        assert not shown.endswith(("E", "EN", "END"))
    assert shown == "The END is near. EN, and "
    assert stream.stopped
    assert (stream.push(500), stream.end()) == ("", "")


def test_what_was_held_back_comes_when_nothing_follows() -> None:
    given_, stopped = pieces(content().encode("Is this the EN"), ("END",))
    assert "".join(given_) == "Is this the EN"
    assert given_[-1] == "EN"
    assert not stopped


@pytest.mark.parametrize("stop", [(), ("",)])
def test_without_a_stop_string_nothing_is_held(stop: tuple[str, ...]) -> None:
    ids = content().encode("plain words")
    assert pieces(ids, stop)[0] == [*(tokenizer().decode([token]) for token in ids), ""]
