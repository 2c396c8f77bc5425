"""The checks over all examples give what a plain loop over their tokens gives, and put no example together for it."""

from collections.abc import Iterator
from typing import Any

import numpy
import pytest

from gemma_ft.data.check.invariants import broken_invariants
from gemma_ft.data.conversation import Conversation, Item, PlainText, Turn
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.pack.arrange import prepare
from gemma_ft.data.pack.counts import count_pieces
from gemma_ft.data.pack.examples import Examples
from gemma_ft.system.limits import IGNORE

ITEMS: list[Item] = [
    *(
        Conversation(f"a:{n}", (Turn("user", "Hi " * n), Turn("assistant", "Yes " * n)) * (1 + n % 3))
        for n in range(1, 12)
    ),
    *(PlainText(f"b:{n}", "word " * 17 * n) for n in range(1, 5)),
]


def tokens_of(examples: Examples, row: int) -> Iterator[tuple[list[int], list[int]]]:
    """(ids, labels) of each document, as a trainer would be given them were nothing checked."""
    for document, start, end in examples.pieces_of(row).tolist():
        ids, labels = (array.tolist() for array in examples.documents.cut(document, start, end))
        yield ([examples.bos, *ids], [IGNORE, *labels]) if start else (ids, labels)


def plain_faults(examples: Examples, encoder: ChatEncoder) -> list[str]:
    """The checks as one would write them down."""
    control = encoder.control
    faults: list[str] = []
    answers = terminators = 0
    for row in range(len(examples)):
        documents = list(tokens_of(examples, row))
        if all(label == IGNORE for _, labels in documents for label in labels):
            faults.append(f"example {row + 1}: no token is trained")
        for number, (ids, labels) in enumerate(documents, start=1):
            place = f"example {row + 1}, document {number}"
            if ids.count(control.bos) != 1 or ids[0] != control.bos:
                faults.append(f"{place}: <bos> occurs {ids.count(control.bos)} times, expected once, at the start")
            if labels[0] != IGNORE:
                faults.append(f"{place}: the first token is trained, it would be predicted from the document before")
            if any(label not in (IGNORE, token) for token, label in zip(ids, labels, strict=True)):
                faults.append(f"{place}: a label differs from its token")
            ends = [at for at, token in enumerate(ids) if token == control.end_of_turn]
            if any(labels[at] == IGNORE and labels[at - 1] != IGNORE for at in ends if at):
                faults.append(f"{place}: an answer is trained without its <end_of_turn>")
            answers += control.start_of_turn in ids
            terminators += sum(labels[at] != IGNORE for at in ends)
    if answers and not terminators:
        faults.append("no <end_of_turn> is trained in any example: the model would never stop")
    return faults


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_they_are_those_of_a_loop_over_all_tokens(encoder: ChatEncoder, packing: bool, seed: int) -> None:
    examples = prepare(ITEMS, encoder, max_seq_len=32, packing=packing).examples
    assert broken_invariants(count_pieces(examples, encoder.control), encoder) == plain_faults(examples, encoder) == []
    part = examples.documents.parts[0]
    (ids, starts), (labels, _) = (tuple(array.copy() for array in both) for both in (part.ids, part.labels))
    generator = numpy.random.default_rng(seed)
    control = encoder.control
    signs = [control.bos, control.end_of_turn, control.start_of_turn, control.pad]
    for _ in range(2 + 12 * seed):
        at = generator.integers(len(ids))
        ids[at] = generator.choice(signs)
        labels[at] = generator.choice([IGNORE, ids[at], control.eos])
        labels[generator.integers(len(ids))] = IGNORE
        first = generator.choice(starts[:-1])
        labels[first] = generator.choice([IGNORE, ids[first]])
    if seed == 5:
        labels[ids == control.end_of_turn] = IGNORE
        ids[2], labels[starts[3] : starts[4]] = control.start_of_turn, IGNORE
    vars(part).update(ids=(ids, starts), labels=(labels, starts))
    expected = plain_faults(examples, encoder)
    assert expected
    assert broken_invariants(count_pieces(examples, encoder.control), encoder) == expected


def test_no_example_is_put_together(encoder: ChatEncoder) -> None:
    class Untouchable(Examples):
        def __getitem__(self, row: Any) -> Any:
            raise AssertionError("an example was put together")

    found = prepare(ITEMS, encoder, max_seq_len=32, packing=True).examples
    rows = [[piece] for piece in range(len(found.pieces))]
    assert (
        broken_invariants(
            count_pieces(Untouchable(found.documents, found.pieces, rows, found.bos), encoder.control), encoder
        )
        == []
    )
