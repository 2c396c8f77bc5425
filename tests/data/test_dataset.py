"""From items to examples: nothing lost or twice, what is left out is counted, and nothing untrainable passes."""

from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_ft.data.conversation import Conversation, PlainText, Turn
from gemma_ft.data.encode.chat import ChatEncoder, Encoded
from gemma_ft.data.encode.documents import Documents
from gemma_ft.data.pack.arrange import DataStats, Prepared, chosen_by_hash, prepare, split_document
from gemma_ft.errors import DataError
from gemma_ft.system.limits import IGNORE
from tests.data.strategies import conversations, documents

SOME = settings(max_examples=80, deadline=None)
items_of_both_kinds = st.lists(st.one_of(conversations(), documents), min_size=1, max_size=8)


def chat(question: str, answer: str, where: str = "x:1", system: str | None = None) -> Conversation:
    turns = [Turn("system", system)] if system is not None else []
    return Conversation(where, (*turns, Turn("user", question), Turn("assistant", answer)))


GOOD = chat("Hi", "Yes")


def whole_documents(prepared: Prepared) -> list[Encoded]:
    """Each document of each example again as a sequence."""
    found = []
    for row, example in enumerate(prepared.examples):
        wheres = prepared.examples.wheres(row)
        for number, where in enumerate(wheres):
            at = [index for index, one in enumerate(example["document_ids"]) if one == number]
            assert at == list(range(at[0], at[-1] + 1))
            assert [example["position_ids"][index] for index in at] == list(range(len(at)))
            found.append(Encoded([example["input_ids"][i] for i in at], [example["labels"][i] for i in at], where))
    return found


def by_content(encoded: list[Encoded]) -> list[Any]:
    return sorted((one.input_ids, one.labels) for one in encoded)


@SOME
@given(items=items_of_both_kinds, packing=st.booleans(), limit=st.sampled_from([64, 256, 4096]))
def test_fault_28_packing_loses_nothing_and_restarts_positions(
    encoder: ChatEncoder, items: list[Any], packing: bool, limit: int
) -> None:
    prepared = prepare([GOOD, *items], encoder, max_seq_len=limit, packing=packing)
    for example in prepared.examples:
        assert len({len(column) for column in example.values()}) == 1
        assert len(example["input_ids"]) <= limit
        assert set(example["document_ids"]) == set(range(max(example["document_ids"]) + 1))
    packed = whole_documents(prepared)
    assert all(one.labels[0] == IGNORE and one.input_ids.count(encoder.control.bos) == 1 for one in packed)
    said = [item for item in [GOOD, *items] if isinstance(item, Conversation)]
    said = [item for item in said if all(turn.content.strip() for turn in item.turns if turn.role != "system")]
    cut = [Encoded(one.input_ids[:limit], one.labels[:limit], "") for one in encoder.encode_many(said)]
    kept = [one for one in cut if set(one.labels) != {IGNORE}]
    alone = prepare(
        [item for item in items if isinstance(item, PlainText)] + [GOOD], encoder, max_seq_len=limit, packing=False
    )
    chunks = [one for one in whole_documents(alone) if encoder.control.start_of_turn not in one.input_ids]
    assert by_content(packed) == by_content(kept + chunks)
    stats = prepared.stats
    assert stats.tokens == sum(len(one.input_ids) for one in packed)
    assert stats.trained_tokens == sum(label != IGNORE for one in packed for label in one.labels)
    assert (stats.documents, stats.packed_rows) == (len(packed), len(prepared.examples))
    assert stats.dropped == len(cut) - len(kept)


@SOME
@given(
    text=st.text(st.characters(codec="ascii", exclude_characters="\x00"), min_size=1, max_size=300),
    limit=st.integers(2, 40),
)
def test_long_documents_are_cut_and_nothing_is_lost(encoder: ChatEncoder, text: str, limit: int) -> None:
    if not text.strip():
        return
    prepared = prepare([PlainText("d:1", text)], encoder, max_seq_len=limit, packing=False)
    parts = [example["input_ids"] for example in prepared.examples]
    assert all(part[0] == encoder.control.bos and 2 <= len(part) <= limit for part in parts)
    assert [token for part in parts for token in part[1:]] == encoder.encode_documents([PlainText("", text)])[
        0
    ].input_ids[1:]
    if limit > 2:  # a chunk of BOS and EOS alone would teach to end at once
        assert [encoder.control.bos, encoder.control.eos] not in parts


def test_packed_rows_keep_their_places(encoder: ChatEncoder) -> None:
    items = [chat("Hi", "Yes", f"x:{number}") for number in range(1, 5)]
    size = len(encoder.encode(GOOD).input_ids)
    prepared = prepare(items, encoder, max_seq_len=2 * size, packing=True)
    wheres = [prepared.examples.wheres(row) for row in range(len(prepared.examples))]
    assert sorted(where for one in wheres for where in one) == ["x:1", "x:2", "x:3", "x:4"]
    assert [len(one) for one in wheres] == [2, 2]
    assert prepared.stats.fill == 1.0


def test_fault_24_rows_whose_answer_is_cut_away_are_dropped_and_counted(encoder: ChatEncoder) -> None:
    items = [GOOD, chat("very long question " * 30, "never seen"), chat("Hi", "long answer " * 60)]
    prepared = prepare(items, encoder, max_seq_len=40, packing=False)
    assert (prepared.stats.dropped, prepared.stats.truncated, prepared.stats.documents) == (1, 1, 2)
    assert all(set(example["labels"]) != {IGNORE} for example in prepared.examples)
    assert prepared.stats.terminators == 1


def message(items: list[Any], encoder: ChatEncoder, limit: int) -> str:
    with pytest.raises(DataError) as caught:
        prepare(items, encoder, max_seq_len=limit, packing=True)
    return str(caught.value)


def test_fault_24_nothing_left_to_train_is_refused(encoder: ChatEncoder) -> None:
    assert message([chat("word " * 50, "a"), chat("a", " ")], encoder, 20) == (
        "none of the 2 rows can be trained on: 1 are empty, 1 have their answer past data.max_seq_len 20"
    )


def test_fault_17_data_that_never_trains_the_terminator_is_refused(encoder: ChatEncoder) -> None:
    assert message([chat("a", "word " * 50), PlainText("d:1", "text")], encoder, 20) == (
        "no <end_of_turn> would be trained: every answer is cut at data.max_seq_len 20; raise it"
    )


def test_plain_text_alone_needs_no_terminator(encoder: ChatEncoder) -> None:
    prepared = prepare([PlainText("d:1", "Once upon a time")], encoder, max_seq_len=64, packing=True)
    assert (prepared.stats.terminators, prepared.stats.documents) == (0, 1)


def test_empty_rows_are_dropped_and_counted(encoder: ChatEncoder) -> None:
    items = [GOOD, chat("a", " \n"), chat("", "b"), PlainText("d:1", " "), chat("a", "b", system=" ")]
    stats = prepare(items, encoder, max_seq_len=64, packing=True).stats
    assert (stats.rows, stats.dropped_empty, stats.documents) == (5, 3, 2)


def test_turns_and_systems_left_out_are_counted(encoders: dict[str, ChatEncoder]) -> None:
    items = [Conversation("x:1", GOOD.turns, left_out=2), chat("a", "b", system="s")]
    stats = prepare(items, encoders["drop"], max_seq_len=64, packing=True).stats
    assert (stats.left_out_turns, stats.dropped_system) == (2, 1)
    assert prepare(items, encoders["fold"], max_seq_len=64, packing=True).stats.dropped_system == 0


def test_all_refused_system_turns_are_named(encoders: dict[str, ChatEncoder]) -> None:
    items = [chat("a", "b", "x:1", system="s"), GOOD, chat("a", "b", "x:3", system="s")]
    reason = "a system turn, and data.system is 'error'; set it to fold or drop"
    assert message(items, encoders["error"], 64) == f"x:1: {reason}\nx:3: {reason}"


def test_stats_tell_what_needs_attention() -> None:
    stats = DataStats(
        rows=1200, documents=1190, packed_rows=100, tokens=200_000, trained_tokens=50_000, truncated=3, dropped=10,
        max_seq_len=2048,
    )  # fmt: skip
    assert stats.describe() == (
        "1,200 rows -> 1,190 sequences, 200,000 tokens, 25% trained\n"
        "100 examples of up to 2,048 tokens, 97.7% full\n"
        "3 cut at max_seq_len\n"
        "10 dropped: their answer lies past max_seq_len"
    )
    assert stats.as_dict()["dropped"] == 10


def test_pairs_are_counted_as_pairs_and_labelled_answers_as_rows() -> None:
    counts = {"rows": 60, "documents": 118, "packed_rows": 59, "tokens": 3304, "trained_tokens": 991, "too_long": 1}
    assert DataStats("pairs", **counts, max_seq_len=512).describe() == (
        "60 pairs -> 118 answers, 3,304 tokens, 30% trained\n"
        "28 of up to 512 tokens in an answer with its prompt\n"
        "1 dropped: longer than max_seq_len (data.too_long: drop)"
    )
    labelled = DataStats("labelled", **counts, max_seq_len=512)
    assert labelled.describe().startswith("60 rows -> 118 answers, 3,304 tokens, 30% trained\n28 of up to 512 ")
    assert "row_kind" not in labelled.as_dict()


MANY_ITEMS: list[Any] = [chat(f"question {number}", "yes", f"x:{number}") for number in range(400)]


def split(items: list[Any], fraction: float, encoder: ChatEncoder, *, seed: int = 1) -> tuple[list[Any], list[Any]]:
    """(train, held out)"""
    out = set(chosen_by_hash(Documents.of(items, encoder), numpy.arange(len(items)), fraction, seed).tolist())
    return [item for at, item in enumerate(items) if at not in out], [items[at] for at in sorted(out)]


def test_split_shares_no_row_and_loses_none(encoder: ChatEncoder) -> None:
    train, held_out = split(MANY_ITEMS, 0.1, encoder)
    assert sorted((*train, *held_out), key=MANY_ITEMS.index) == MANY_ITEMS
    assert 20 <= len(held_out) <= 60
    assert split(MANY_ITEMS, 0.1, encoder) == (train, held_out)
    assert split(MANY_ITEMS, 0.1, encoder, seed=2) != (train, held_out)


def test_split_keeps_equal_rows_together(encoder: ChatEncoder) -> None:
    again = [Conversation(f"y:{number}", item.turns) for number, item in enumerate(MANY_ITEMS)]
    train, held_out = split([*MANY_ITEMS, *again], 0.1, encoder)
    assert not {item.turns for item in train} & {item.turns for item in held_out}


def test_rows_are_equal_that_are_encoded_alike(encoders: dict[str, ChatEncoder]) -> None:
    """A system turn that is dropped makes no other row; one that is folded does."""
    plain = chat("a", "b")
    with_system = Conversation("x:2", (Turn("system", "Be brief."), *plain.turns))
    folded = chat("Be brief.\n\na ", "b")
    for policy, equal in (("drop", plain), ("fold", folded)):
        encoder = encoders[policy]
        assert encoder.content_hash(with_system) == encoder.content_hash(equal)
        assert encoder.encode(with_system).input_ids == encoder.encode(equal).input_ids
    assert encoders["fold"].content_hash(with_system) != encoders["fold"].content_hash(plain)


def test_added_rows_move_no_other(encoder: ChatEncoder) -> None:
    before = split(MANY_ITEMS[:200], 0.1, encoder)[1]
    after = split(MANY_ITEMS, 0.1, encoder)[1]
    assert [item for item in after if item in MANY_ITEMS[:200]] == before


def test_split_holds_out_one_row_at_least(encoder: ChatEncoder) -> None:
    train, held_out = split(MANY_ITEMS[:3], 0.001, encoder)
    assert (len(train), len(held_out)) == (2, 1)


def test_split_of_one_row_is_refused(encoder: ChatEncoder) -> None:
    with pytest.raises(DataError) as caught:
        split([GOOD], 0.5, encoder)
    assert str(caught.value) == "data.eval_fraction: 1 rows cannot be split; give data.eval, or more rows"


def test_split_cuts_a_single_document_at_a_line() -> None:
    text = "".join(f"line {number}\n" for number in range(100))
    train, held_out = split_document(PlainText("d:1", text), 0.1)
    assert train[0].text + held_out[0].text == text  # type: ignore[union-attr]
    assert train[0].text.endswith("\n")  # type: ignore[union-attr]
    assert 5 <= held_out[0].text.count("\n") <= 15  # type: ignore[union-attr]
    with pytest.raises(DataError) as caught:
        split_document(PlainText("d:1", "one line only"), 0.1)
    assert str(caught.value) == (
        "data.eval_fraction: a single document without line breaks cannot be split; give data.eval"
    )
