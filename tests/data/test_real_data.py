"""The real files, by detection alone: read, parsed, prepared at 512 tokens, and clean under the preview's checks."""

from collections.abc import Callable

import pytest

from gemma_ft.data.check.invariants import broken_invariants
from gemma_ft.data.conversation import PlainText
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.pack.arrange import Prepared, prepare, split_document
from gemma_ft.data.pack.counts import count_pieces
from gemma_ft.data.read.detect import detect_format
from gemma_ft.data.read.parse_rows import parse_rows
from gemma_ft.data.read.sources import read_rows

Find = Callable[[str], str]


def prepared_file(source: str, encoder: ChatEncoder) -> Prepared:
    prepared = prepare(parse_rows(read_rows(source)), encoder, max_seq_len=512, packing=True)
    assert broken_invariants(count_pieces(prepared.examples, encoder.control), encoder) == []
    return prepared


def test_gsm8k(real_data: Find, encoder: ChatEncoder) -> None:
    source = real_data("gsm8k_train.jsonl")
    assert detect_format(read_rows(source)) == ("prompt_completion", "the rows have question, answer")
    stats = prepared_file(source, encoder).stats
    assert stats.rows == 7473
    assert stats.documents + stats.dropped == 7473
    assert stats.dropped < 75
    assert stats.fill > 0.9
    long = prepare(parse_rows(read_rows(source)), encoder, max_seq_len=2048, packing=True).stats
    assert (long.documents, long.truncated, long.dropped) == (7473, 0, 0)
    assert long.fill > 0.98


def test_seed_tasks(real_data: Find, encoder: ChatEncoder) -> None:
    source = real_data("seed_tasks.jsonl")
    assert detect_format(read_rows(source)) == ("alpaca", "the rows have instruction, instances")
    stats = prepared_file(source, encoder).stats
    assert (stats.rows, stats.documents + stats.dropped) == (175, 175)


def test_sharegpt_sample(real_data: Find, encoder: ChatEncoder) -> None:
    source = real_data("sharegpt_sample.json")
    assert detect_format(read_rows(source)) == ("sharegpt", "the rows have conversations")
    prepared = prepared_file(source, encoder)
    assert (prepared.stats.rows, prepared.stats.documents, prepared.stats.left_out_turns) == (500, 500, 0)
    assert prepared.stats.terminators == 1000


def test_tinyshakespeare(real_data: Find, encoder: ChatEncoder) -> None:
    source = real_data("tinyshakespeare.txt")
    rows = read_rows(source)
    assert detect_format(rows) == ("text", "the rows have text")
    prepared = prepared_file(source, encoder)
    assert prepared.stats.fill > 0.99
    (document,) = parse_rows(rows)
    assert isinstance(document, PlainText)
    train, held_out = split_document(document, 0.1)
    assert isinstance(train[0], PlainText)
    assert isinstance(held_out[0], PlainText)
    assert train[0].text + held_out[0].text == rows[0].fields["text"]


@pytest.mark.parametrize("name", ["gsm8k_train.jsonl", "seed_tasks.jsonl", "sharegpt_sample.json"])
def test_answers_come_back_from_their_labels(real_data: Find, encoder: ChatEncoder, name: str) -> None:
    items = parse_rows(read_rows(real_data(name)))[:100]
    for item in items:
        assert not isinstance(item, PlainText)
        labels = [label for label in encoder.encode(item).labels if label != -100]
        answers = [turn.content.strip() for turn in item.turns if turn.role == "assistant"]
        assert encoder.tokenizer.decode(labels) == "".join(f"{answer}<end_of_turn>" for answer in answers)
