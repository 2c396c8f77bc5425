"""Length policies, repeats and weights: what becomes of each document, to the token."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_ft.data.conversation import Conversation, PlainText, Turn
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.documents import Documents
from gemma_ft.data.pack.arrange import TooLong, prepare, shares, times
from gemma_ft.errors import DataError
from gemma_ft.system.limits import IGNORE


def chat(*said: str, where: str = "x:1", train: tuple[bool, ...] = ()) -> Conversation:
    turns = []
    for number, text in enumerate(said):
        learned = train[number // 2] if train and number % 2 else True
        turns.append(Turn("assistant" if number % 2 else "user", text, learned))
    return Conversation(where, tuple(turns))


SHORT = chat("Hi", "Yes", where="x:1")
LONG = chat("Tell me all.", "It was so. " * 20, where="x:2")


def lengths(encoder: ChatEncoder, policy: TooLong, limit: int = 48) -> tuple[list[int], Any]:
    found = prepare([SHORT, LONG], encoder, max_seq_len=limit, packing=False, too_long=policy)
    return found.examples.lengths.tolist(), found


def test_each_policy(encoder: ChatEncoder) -> None:
    whole = encoder.encode(LONG)
    size, short = len(whole.input_ids), len(encoder.encode(SHORT).input_ids)
    bos = encoder.control.bos
    cut, right = lengths(encoder, "auto")
    assert cut == [short, 48]
    assert right.examples[1]["input_ids"] == whole.input_ids[:48]
    assert (right.stats.truncated, right.stats.dropped) == (1, 0)
    _, left = lengths(encoder, "truncate_left")
    assert left.examples[1]["input_ids"] == [bos, *whole.input_ids[-47:]]
    assert left.examples[1]["labels"] == [IGNORE, *whole.labels[-47:]]
    assert left.examples[1]["position_ids"] == list(range(48))
    assert (left.stats.truncated, left.stats.terminators) == (1, 2)
    cut, dropped = lengths(encoder, "drop")
    assert cut == [short]
    assert (dropped.stats.too_long, dropped.stats.dropped) == (1, 0)
    _, split = lengths(encoder, "split")
    parts = [example["input_ids"][1:] for example in split.examples[1:]]
    labels = [label for example in split.examples[1:] for label in example["labels"][1:]]
    assert whole.input_ids[-sum(map(len, parts)) :] == [token for part in parts for token in part]
    assert [one for one in labels if one != IGNORE] == [one for one in whole.labels if one != IGNORE]
    assert all(example["input_ids"][0] == bos for example in split.examples)
    assert split.stats.trained_tokens == sum(len([x for x in e["labels"] if x != IGNORE]) for e in split.examples)
    with pytest.raises(DataError) as caught:
        lengths(encoder, "error")
    assert str(caught.value) == f"x:2: {size} tokens, more than data.max_seq_len 48 (data.too_long: error)"


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(["auto", "truncate_left", "split", "drop"]), st.integers(12, 90), st.integers(1, 60))
def test_no_row_is_longer_and_none_without_a_trained_token(
    encoder: ChatEncoder, policy: TooLong, limit: int, words: int
) -> None:
    items = [SHORT, chat("ask " * words, "say " * words), PlainText("d:1", "word " * words)]
    found = prepare(items, encoder, max_seq_len=max(limit, 16), packing=True, too_long=policy)
    for example in found.examples:
        assert len(example["input_ids"]) <= max(limit, 16)
        for document in set(example["document_ids"]):
            labels = [one for one, at in zip(example["labels"], example["document_ids"], strict=True) if at == document]
            assert any(label != IGNORE for label in labels)
    assert found.stats.trained_tokens == sum(
        label != IGNORE for example in found.examples for label in example["labels"]
    )


def test_answers_that_are_not_to_be_trained(tokenizer: Any) -> None:
    item = chat("a", "one", "b", "two", "c", "three", train=(True, False, True))
    every, last = ChatEncoder(tokenizer), ChatEncoder(tokenizer, trained_turns="last")

    def trained(encoder: ChatEncoder, one: Conversation) -> str:
        return str(tokenizer.decode([label for label in encoder.encode(one).labels if label != IGNORE]))

    assert trained(every, item) == "one<end_of_turn>three<end_of_turn>"
    assert trained(last, item) == "three<end_of_turn>"
    assert every.encode(item).input_ids == last.encode(item).input_ids


def test_a_chat_of_which_nothing_is_to_be_trained_is_left_out(tokenizer: Any) -> None:
    last = ChatEncoder(tokenizer, trained_turns="last")
    items = [SHORT, chat("a", "one", "b", "two", train=(True, False))]
    found = prepare(items, last, max_seq_len=64, packing=False)
    assert (len(found.examples), found.stats.untrained, found.stats.rows) == (1, 1, 2)
    assert "1 dropped: none of their answers is to be trained" in found.stats.describe()


def test_repeats_are_whole_times_and_a_share_that_stays(encoder: ChatEncoder) -> None:
    documents = Documents.of([chat(f"q{n}", f"a{n}") for n in range(40)], encoder)
    contents, numbers = documents.contents(), numpy.arange(40)
    assert times(numbers, 1, contents, 0).tolist() == list(range(40))
    assert times(numbers, 2, contents, 0).tolist() == sorted([*range(40)] * 2)
    half = times(numbers, 0.5, contents, 0).tolist()
    assert len(half) == 20 == len(set(half))
    assert times(numbers, 2.5, contents, 0).tolist() == sorted([*range(40)] * 2 + half)
    assert half != times(numbers, 0.5, contents, 1).tolist()
    assert set(times(numbers, 0.25, contents, 0).tolist()) < set(half), "a smaller share is part of a larger one"


def test_weights_give_shares_of_rows() -> None:
    assert shares([1, 1], [100, 100]) == [1.0, 1.0]
    assert shares([3, 1], [300, 50]) == [0.5, 1.0]
    assert shares([0.7, 0.3], [1000, 1000]) == pytest.approx([1.0, 3 / 7])
