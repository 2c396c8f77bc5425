"""The figures of a preview are sums over what is trained, counted here by hand."""

import numpy
import pytest

from gemma_ft.data.check.overview import BINS, Overview, histogram, overview
from gemma_ft.data.conversation import Conversation, Item, PlainText, Turn
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.documents import Documents
from gemma_ft.data.pack.arrange import Prepared, prepare
from gemma_ft.data.pack.counts import count_pieces
from gemma_ft.data.pack.examples import Examples, steps_per_epoch
from gemma_ft.system.limits import IGNORE

LIMIT = 48
ITEMS: list[Item] = [
    Conversation("a.jsonl:1", (Turn("user", "Hi"), Turn("assistant", "Yes"))),
    Conversation("a.jsonl:2", (Turn("user", "Hi"), Turn("assistant", "one two " * 40))),
    Conversation("a.jsonl:3", (Turn("user", "word " * 80), Turn("assistant", "past the limit"))),
    PlainText("b.txt:1", "once upon a time " * 30),
]


def figures(prepared: Prepared, encoder: ChatEncoder) -> Overview:
    return overview(prepared.examples.documents, count_pieces(prepared.examples, encoder.control))


@pytest.mark.parametrize("packing", [True, False])
def test_sources_add_up(encoder: ChatEncoder, packing: bool) -> None:
    prepared = prepare(ITEMS, encoder, max_seq_len=LIMIT, packing=packing)
    chats, text = figures(prepared, encoder).sources
    assert (chats.name, chats.rows, chats.documents, chats.truncated) == ("a.jsonl", 2, 2, 1)
    assert (text.name, text.rows, text.truncated) == ("b.txt", 1, 0)
    examples, stats = list(prepared.examples), prepared.stats
    trained = sum(label != IGNORE for example in examples for label in example["labels"])
    assert chats.tokens + text.tokens == stats.tokens == sum(len(example["input_ids"]) for example in examples)
    assert chats.trained + text.trained == stats.trained_tokens == trained
    assert text.documents == stats.documents - 2
    assert chats.share == chats.trained / chats.tokens


def test_lengths_shares_and_what_is_cut(encoder: ChatEncoder) -> None:
    prepared = prepare(ITEMS, encoder, max_seq_len=LIMIT, packing=True)
    found = figures(prepared, encoder)
    whole = [len(encoder.encode(one).input_ids) for one in ITEMS[:2]]  # type: ignore[arg-type]
    assert found.lengths.tolist() == [*whole, len(encoder.encode_documents([ITEMS[3]])[0].input_ids)]  # type: ignore[arg-type]
    lost = encoder.encode(ITEMS[1]).labels[LIMIT:]  # type: ignore[arg-type]
    assert (found.cut_tokens, found.cut_trained) == (len(lost), sum(label != IGNORE for label in lost))
    assert len(found.shares) == prepared.stats.documents
    assert float(found.shares[1]) == sum(x != IGNORE for x in encoder.encode(ITEMS[1]).labels[:LIMIT]) / LIMIT  # type: ignore[arg-type]


def test_a_document_seen_twice_counts_twice_and_is_cut_once(encoder: ChatEncoder) -> None:
    documents = Documents.of(ITEMS[:2], encoder)
    sizes = documents.column("tokens").tolist()
    pieces = numpy.array([(0, 0, sizes[0]), (1, 0, LIMIT)])
    examples = Examples(documents, pieces, [[0, 1], [1]], encoder.control.bos)
    found = overview(documents, count_pieces(examples, encoder.control))
    assert (found.sources[0].rows, found.sources[0].tokens) == (2, sizes[0] + 2 * LIMIT)
    assert found.cut_tokens == sizes[1] - LIMIT


def test_bins_hold_every_value_once() -> None:
    found = histogram(numpy.array([1, 10, 11, 240]))
    assert (found.width, sum(found.counts), found.beyond) == (10, 4, 0)
    assert (found.counts[0], found.counts[1], found.counts[23]) == (2, 1, 1)
    one_book = histogram(numpy.array([20] * 500 + [300_000]))
    assert (one_book.width * len(one_book.counts), one_book.beyond) == (40, 1)
    assert (len(one_book.counts), one_book.counts[-1]) == (20, 1)
    assert len(histogram(numpy.array([7])).counts) <= BINS


def test_the_last_step_of_an_epoch_may_be_smaller() -> None:
    assert [steps_per_epoch(examples, 4) for examples in (1, 4, 5)] == [1, 1, 2]
