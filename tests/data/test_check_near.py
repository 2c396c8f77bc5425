"""Texts that are nearly the same are found, others are not, and what all of them share does not count."""

import random

from gemma_ft.data.check.near_duplicates import ALIKE, NearPair, NearTexts

WORDS = [f"word{number}" for number in range(500)]


def text_of(words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def pairs_of(texts: list[str]) -> list[NearPair]:
    near = NearTexts()
    for number, text in enumerate(texts):
        near.add(number, text)
    return near.pairs()


def changed(text: str, words: int) -> str:
    """The text with so many words replaced, far from each other."""
    parts = text.split()
    for at in range(words):
        parts[(2 * at + 1) * len(parts) // (2 * words)] = f"other{at}"
    return " ".join(parts)


def test_one_changed_word_is_near_and_many_are_not() -> None:
    texts = [text_of(100, seed) for seed in range(50)]
    near = [changed(text, 1) for text in texts[:20]]
    far = [changed(text, 15) for text in texts[20:40]]
    found = pairs_of(texts + near + far)
    assert [(pair.earlier, pair.later) for pair in found] == [(number, 50 + number) for number in range(20)]
    assert all(ALIKE <= pair.alike < 1 for pair in found)


def test_case_space_and_punctuation_do_not_matter_and_signs_do() -> None:
    text = "Tom has three apples, and he buys two more; how many are there now"
    assert [pair.alike for pair in pairs_of([text, text.upper().replace(",", " ,").replace(";", "\n")])] == [1.0]
    sums = ["compute 2 + 2 + 2 for me please", "compute 2 * 2 * 2 for me please"]
    assert pairs_of(sums) == []


def test_each_of_many_alike_has_an_earlier_one() -> None:
    others = [text_of(100, seed) for seed in range(400)]
    text = text_of(100, 1000)
    found = pairs_of(others + [changed(text, 1).replace("other0", f"new{number}") for number in range(300)])
    assert {pair.later for pair in found} == set(range(401, 700))
    assert len(found) < 300 * 80, "not every pair is looked at"


def test_a_long_prompt_that_rows_share_does_not_make_them_alike() -> None:
    prompt = text_of(300, 1)
    texts = [f"{prompt} {text_of(12, seed)}" for seed in range(2, 100)]
    assert pairs_of(texts) == []
    assert len(pairs_of(texts[:5])) > 0, "among five, none can be called a template"
    found = pairs_of([*texts, texts[7].rpartition(" ")[0]])
    assert [(pair.earlier, pair.later) for pair in found] == [(7, 98)]


def test_texts_of_hardly_any_words_say_too_little() -> None:
    assert pairs_of(["yes it is", "yes it is", "", ""]) == []


def test_a_book_is_compared_in_parts() -> None:
    book = text_of(60_000, 1)
    (pair,) = pairs_of([book, changed(book, 600), text_of(60_000, 2)])
    assert (pair.earlier, pair.later) == (0, 1)
