"""Pairs and labelled answers on their way to a batch: one prompt, two halves, cut and dropped as a pair, wherever they
lie in a sequence or a batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch

from gemma_ft.data.conversation import Conversation, Item, Pair, Turn
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.documents import Documents
from gemma_ft.data.pack.arrange import Prepared, arrange, chosen_by_hash, prepare, times
from gemma_ft.data.pack.collate_preferences import PreferenceCollator, answers_of
from gemma_ft.errors import DataError
from gemma_ft.system.limits import IGNORE


def turns(*said: str, first: str = "user", train: bool = True) -> tuple[Turn, ...]:
    roles = itertools.cycle(("user", "assistant") if first == "user" else ("assistant", "user"))
    return tuple(Turn(role, text, train) for role, text in zip(roles, said, strict=False))  # type: ignore[arg-type]


def pair(asked: str | Sequence[str], chosen: str, rejected: str, **more: Any) -> Pair:
    asked = [asked] if isinstance(asked, str) else asked
    prompt = tuple(replace(turn, train=turn.role == "user") for turn in turns(*asked))
    halves = (turns(text, first="assistant") for text in (chosen, rejected))
    return Pair(more.pop("where", "x:1"), prompt, *halves, **more)


def compared(items: Sequence[Item | Pair], encoder: ChatEncoder, limit: int = 64, **more: Any) -> Prepared:
    return prepare(items, encoder, **{"max_seq_len": limit, "packing": False, **more})


def trained(half: dict[str, list[Any]]) -> list[int]:
    return [label for label in half["labels"] if label != IGNORE]


PAIRS = [pair(f"What is {n}?" + " Say." * (n % 3), f"{n}." + " Yes." * (n % 4), "No." * (1 + n % 2)) for n in range(7)]


# Halves


def test_both_halves_are_the_prompt_and_an_answer_encoded_from_their_parts(encoder: ChatEncoder) -> None:
    """In each the prompt's ids come first, to the token, and what is trained is the half's answer with its end."""
    one = pair(["Who?", "Me.", "And now?"], "You.", "Nobody at all.")
    ids = encoder.encode_prompt(one.prompt)
    halves = answers_of(compared([one], encoder).examples[0])
    assert len(halves) == 2
    for half, said in zip(halves, ("You.", "Nobody at all."), strict=True):
        assert half["input_ids"][: len(ids)] == ids
        assert half["labels"][: len(ids)] == [IGNORE] * len(ids)
        assert trained(half) == [*encoder.content.encode(said), encoder.control.end_of_turn]
        assert half["position_ids"] == list(range(len(half["input_ids"])))
    assert halves[0]["input_ids"] == encoder.encode(one.halves[0]).input_ids


@pytest.mark.parametrize("trained_turns", ["all", "last"])
def test_what_is_trained_of_halves_of_several_turns(tokenizer: Any, trained_turns: Any) -> None:
    encoder = ChatEncoder(tokenizer, "fold", trained_turns)
    halves = (turns("A1", "B1?", "C1", first="assistant"), turns("A2", "B2?", "C2", first="assistant"))
    one = Pair("x:1", (Turn("system", "Be short."), *turns("Hi", "Old answer.", "So?", train=False)), *halves)
    found = answers_of(compared([one], encoder, 96).examples[0])
    for half, said in zip(found, (("A1", "C1"), ("A2", "C2")), strict=True):
        meant = said if trained_turns == "all" else said[-1:]
        assert trained(half) == [
            token for text in meant for token in (*encoder.content.encode(text), encoder.control.end_of_turn)
        ]
    folded = encoder.encode_prompt(turns("Be short.\n\nHi", "Old answer.", "So?"))
    assert [half["input_ids"][: len(folded)] for half in found] == [folded, folded]


def test_a_system_turn_is_refused_or_left_out_by_policy_once_for_a_pair(encoders: dict[str, ChatEncoder]) -> None:
    one = pair("Hi", "Yes", "No")
    one = replace(one, prompt=(Turn("system", "Be short."), *one.prompt))
    with pytest.raises(DataError) as caught:
        compared([one], encoders["error"])
    assert str(caught.value) == (
        "x:1: a system turn, and data.system is 'error'; set it to fold or drop"
    )  # fmt: skip
    found = compared([one], encoders["drop"])
    assert found.stats.dropped_system == 1
    assert (
        answers_of(found.examples[0])[0]["input_ids"]
        == encoders["drop"].encode(pair("Hi", "Yes", "No").halves[0]).input_ids
    )


def test_p6_the_prompt_of_a_pair_is_a_prefix_of_both_halves(encoder: ChatEncoder) -> None:
    """P6: a prompt rendered alone is no prefix of the whole elsewhere, and the completion starts at a wrong token."""
    awkward = ("ends in a blank ", "1\n\n", "<b>", "naïve", "a", "…", "word\n", "\tx")
    answers = (("\n\nnext", "next"), (" led", "led"), ("ab", "abc"), ("1", "11"))
    for asked, (chosen, rejected) in itertools.product(awkward, answers):
        one = pair(asked, chosen, rejected)
        ids = encoder.encode_prompt(one.prompt)
        for half in answers_of(compared([one], encoder).examples[0]):
            first = next(at for at, label in enumerate(half["labels"]) if label != IGNORE)
            assert (half["input_ids"][:first], first) == (ids, len(ids)), (asked, chosen)


@pytest.mark.parametrize("too_long", ["drop", "truncate_left"])
def test_p7_each_answer_has_one_bos_and_one_end(encoder: ChatEncoder, too_long: Any) -> None:
    """P7: a second BOS, or none. Of every answer in a batch the first token is BOS and no other is; packed as well."""
    long = pair("Tell me. " * 20, "Well.", "No, no.")
    found = compared([*PAIRS, long], encoder, too_long=too_long)
    assert len(found.examples) == len(PAIRS) + (too_long == "truncate_left")
    for budget in (None, 64):
        batch = PreferenceCollator(encoder.control.pad, budget=budget)(found.examples[:])
        real = batch["document_ids"] >= 0
        starts = (batch["position_ids"] == 0) & real
        assert int(starts.sum()) == len(batch["sides"])
        assert torch.equal(starts, (batch["input_ids"] == encoder.control.bos) & real)
        ends = (batch["labels"] == encoder.control.end_of_turn).sum()
        assert int(ends) == len(batch["sides"])


# Long pairs

LONG = pair("Tell me all of it, please. " * 6, "It was so.", "No. " * 9, where="x:2")
SHORT = pair("Hi", "Yes", "No", where="x:1")


def test_a_pair_is_dropped_as_a_pair(encoder: ChatEncoder) -> None:
    """Where one half alone is too long, too: what is left of the other compares with nothing."""
    sizes = [len(encoder.encode(half).input_ids) for half in LONG.halves]
    limit = max(sizes) - 1
    assert min(sizes) <= limit < max(sizes)
    for policy in ("auto", "drop"):
        found = compared([SHORT, LONG], encoder, limit, too_long=policy)
        assert len(found.examples) == 1
        assert (found.stats.rows, found.stats.documents, found.stats.too_long) == (2, 2, 1)
    whole = compared([SHORT, LONG], encoder, max(sizes), too_long="drop")
    assert (len(whole.examples), whole.stats.too_long) == (2, 0)


def test_both_prompts_are_cut_at_the_same_token(encoder: ChatEncoder) -> None:
    """As much as the longer half asks for: they stay one prompt. A BOS of its own comes in front; no answer is cut."""
    bos, limit = encoder.control.bos, 48
    whole = [encoder.encode(half) for half in LONG.halves]
    found = compared([SHORT, LONG], encoder, limit, too_long="truncate_left")
    first, second = answers_of(found.examples[1])
    assert max(len(first["input_ids"]), len(second["input_ids"])) == limit
    cut = max(len(one.input_ids) for one in whole) - limit + 1
    for half, full in zip((first, second), whole, strict=True):
        assert half["input_ids"] == [bos, *full.input_ids[cut:]]
        assert half["labels"] == [IGNORE, *full.labels[cut:]]
        assert trained(half) == [label for label in full.labels if label != IGNORE]
    heads = [half["input_ids"][: len(half["input_ids"]) - len(trained(half)) - 1] for half in (first, second)]
    assert heads[0] == heads[1]
    assert (found.stats.truncated, found.stats.dropped, found.stats.terminators) == (1, 0, 4)


def test_a_pair_whose_answer_leaves_no_room_for_its_question_is_dropped(encoder: ChatEncoder) -> None:
    endless = pair("Why?", "Because. " * 40, "No.", where="x:3")
    found = compared([SHORT, endless], encoder, 48, too_long="truncate_left")
    assert (len(found.examples), found.stats.dropped, found.stats.truncated) == (1, 1, 0)
    size = max(len(encoder.encode(half).input_ids) for half in endless.halves)
    with pytest.raises(DataError) as caught:
        compared([SHORT, endless], encoder, 48, too_long="error")
    assert str(caught.value) == f"x:3: {size} tokens, more than data.max_seq_len 48 (data.too_long: error)"


# Weights, margins, repeats


def test_weights_margins_and_sides_of_rows(encoder: ChatEncoder) -> None:
    rows = [replace(PAIRS[0], weight=2.5, margin=0.75), PAIRS[1], replace(PAIRS[2], weight=0.0)]
    found = compared(rows, encoder)
    assert (len(found.examples), found.stats.untrained) == (2, 1)  # a row of weight 0 is none
    batch = PreferenceCollator(0)(found.examples[:])
    assert batch["sides"].tolist() == [1, 0, 1, 0]
    assert batch["row_weights"].tolist() == [2.5, 1.0]
    assert batch["margins"].tolist() == [0.75, 0.0]
    assert "loss_weights" not in batch  # a weight is of a pair, not of its tokens


def test_a_labelled_answer_has_its_side_and_a_number_of_its_own(encoder: ChatEncoder) -> None:
    rows = [Conversation("x", turns("Hi", f"Answer {n}."), label=n % 2 == 0, weight=1 + n) for n in range(3)]
    found = compared(rows, encoder)
    batch = PreferenceCollator(0)(found.examples[:])
    assert (batch["sides"].tolist(), batch["row_weights"].tolist()) == ([1, 0, 1], [1.0, 2.0, 3.0])
    assert sorted(set(batch["answer_ids"][batch["labels"] != IGNORE].tolist())) == [0, 1, 2]
    assert found.stats.rows == 3


@pytest.mark.parametrize(("repeats", "seen"), [(2.0, 14), (0.5, 4), (1.5, 11)])
def test_a_pair_is_repeated_as_a_pair(encoder: ChatEncoder, repeats: float, seen: int) -> None:
    documents = Documents.of(PAIRS, encoder)
    meant = times(numpy.arange(0, len(documents), 2), repeats, documents.contents(), seed=1)
    found = arrange(documents, encoder, max_seq_len=64, packing=True, chosen=meant)
    assert len(found.examples) == seen == found.stats.rows
    for example in found.examples[:]:
        assert example["sides"] == [1, 0]
        assert one_prompt(example) in {tuple(encoder.encode_prompt(one.prompt)) for one in PAIRS}


def one_prompt(example: dict[str, list[Any]]) -> tuple[int, ...]:
    """The one prompt of a pair."""
    heads = set()
    for half in answers_of(example):
        first = next(at for at, label in enumerate(half["labels"]) if label != IGNORE)
        heads.add(tuple(half["input_ids"][:first]))
    (only,) = heads
    return only


def test_a_prompt_stays_on_one_side_of_a_split(encoder: ChatEncoder) -> None:
    """Whatever the answers are: 20 prompts with three pairs each."""
    rows = [pair(f"Question {n % 20}?", f"Yes {n}.", f"No {n}.") for n in range(60)]
    documents = Documents.of(rows, encoder)
    out = chosen_by_hash(documents, numpy.arange(len(documents)), 0.25, seed=3)
    sides = [{number // 2 for number in out.tolist()}, set(range(60)) - {number // 2 for number in out.tolist()}]
    prompts = [{rows[number].prompt for number in side} for side in sides]
    assert all(sides)
    assert not prompts[0] & prompts[1]


def test_the_content_of_a_pair_and_of_its_labelled_halves_is_the_prompt(encoder: ChatEncoder) -> None:
    one, other = pair("Hi", "Yes", "No"), pair("Hi ", "Perhaps", "Never", margin=1.0)
    good = Conversation("x", turns("Hi", "Yes"), label=True)
    assert encoder.content_hash(one) == encoder.content_hash(other) == encoder.content_hash(good)
    assert encoder.content_hash(pair("Ho", "Yes", "No")) != encoder.content_hash(one)


# What a run is known by


def test_the_prompt_of_labelled_halves_of_several_turns_is_that_of_their_pair(encoder: ChatEncoder) -> None:
    """So that both halves fall on one side of a split, though they go on in different ways."""
    asked = (Turn("user", "Hi"), Turn("assistant", "Hello", train=False), Turn("user", "And?"))
    ways = [(Turn("assistant", a), Turn("user", b), Turn("assistant", c)) for a, b, c in ("abc", "xyz")]
    pair = Pair("a:1", asked, *ways)
    halves = [replace(half, label=label) for half, label in zip(pair.halves, (True, False), strict=True)]
    assert {encoder.content_hash(half) for half in halves} == {encoder.content_hash(pair)}


def test_a_fingerprint_tells_sides_margins_and_weights(encoder: ChatEncoder) -> None:
    def of(*rows: Item | Pair, limit: int = 64) -> str:
        return compared(rows, encoder, limit).examples.fingerprint()

    rows = PAIRS[:3]
    swapped = replace(rows[1], chosen=rows[1].rejected, rejected=rows[1].chosen)
    changed = {
        of(*rows), of(rows[0], swapped, rows[2]), of(replace(rows[0], margin=0.5), *rows[1:]),
        of(replace(rows[0], weight=2.0), *rows[1:]), of(*reversed(rows)), of(*rows[:2]),
    }  # fmt: skip
    assert len(changed) == 6
    assert of(*rows) == of(*(replace(one, where="other:9") for one in rows))
    verdicts = [of(Conversation("x", turns("Hi", "Yes"), label=label)) for label in (True, False)]
    assert len({*verdicts, of(Conversation("x", turns("Hi", "Yes")))}) == 3


# Batches


def answers_in(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """(ids of the document, labels of it) for each answer, by its number, wherever it lies."""
    found = {}
    for row in range(len(batch["input_ids"])):
        for document in sorted(set(batch["document_ids"][row].tolist()) - {-1}):
            inside = batch["document_ids"][row] == document
            (number,) = set(batch["answer_ids"][row][inside & (batch["labels"][row] != IGNORE)].tolist())
            found[number] = batch["input_ids"][row][inside].tolist(), batch["labels"][row][inside].tolist()
    return [found[number] for number in range(len(found))]


@pytest.mark.parametrize("budget", [16, 64, 150])
def test_packed_answers_are_those_of_their_own_sequences(encoder: ChatEncoder, budget: int) -> None:
    rows = compared(PAIRS, encoder).examples[:]
    alone, packed = PreferenceCollator(0)(rows), PreferenceCollator(0, budget=budget)(rows)
    assert answers_in(packed) == answers_in(alone)
    assert len(alone["input_ids"]) == 14
    assert len(packed["input_ids"]) < 14 or budget == 16  # which none fits into: each then has its own
    assert packed["input_ids"].shape[1] <= max(budget, alone["input_ids"].shape[1])
    for name in ("sides", "row_weights", "margins"):
        assert torch.equal(alone[name], packed[name])
    assert int((packed["answer_ids"] >= 0).sum()) == int((alone["answer_ids"] >= 0).sum())


def test_a_blank_row_has_no_answer(encoder: ChatEncoder) -> None:
    from gemma_ft.train.sampler import blank_row

    examples = compared(PAIRS, encoder).examples
    for budget in (None, 64):
        collate = PreferenceCollator(0, budget=budget)
        blank = collate([blank_row(0)])
        assert {name: blank[name].tolist() for name in ("sides", "row_weights", "margins")} == {
            "sides": [], "row_weights": [], "margins": []
        }  # fmt: skip
        assert (blank["answer_ids"].tolist(), blank["labels"].tolist()) == ([[-1]], [[IGNORE]])
        assert (blank["sides"].dtype, blank["row_weights"].dtype) == (torch.int64, torch.float32)
        one = collate(examples[:1])
        assert all(torch.equal(one[name], value) for name, value in collate([*examples[:1], blank_row(0)]).items())


# Tokens that are computed once


@pytest.mark.parametrize("budget", [None, 64])
def test_two_answers_share_their_prompt_and_padding_is_left_out(encoder: ChatEncoder, budget: int | None) -> None:
    """What is said of a token (its id, its position, its prompt) is that of the one that is computed for it."""
    rows = compared(PAIRS, encoder).examples[:]
    batch = PreferenceCollator(encoder.control.pad, budget=budget)(rows)
    real, places = batch["attention_mask"].bool(), batch["distinct_places"]
    prompts = [len(encoder.encode_prompt(one.prompt)) for one in PAIRS]
    assert len(batch["distinct_firsts"]) == int(real.sum()) - sum(prompts)
    for name in ("input_ids", "position_ids"):
        assert torch.equal(batch[name].flatten()[batch["distinct_firsts"]][places][real], batch[name][real])
    again = torch.zeros_like(real.flatten())
    again[batch["distinct_repeats"]] = True
    assert int(again.sum()) == sum(prompts)
    assert not (batch["labels"].flatten()[again] != IGNORE).any()
    of_firsts = places.flatten()[batch["distinct_firsts"]]
    assert of_firsts.tolist() == list(range(len(of_firsts)))
    assert torch.equal(places[real].unique(), of_firsts)


def test_a_prompt_is_shared_by_two_answers_at_most(encoder: ChatEncoder) -> None:
    """So that no sum of gradients has an order; the third answer to a prompt shares it with the fourth."""
    rows = compared([PAIRS[0]] * 3, encoder).examples[:]
    batch = PreferenceCollator(encoder.control.pad)(rows)
    _, counts = batch["distinct_places"][batch["attention_mask"].bool()].unique(return_counts=True)
    assert counts.max() == 2
    assert int((counts == 2).sum()) == 3 * len(encoder.encode_prompt(PAIRS[0].prompt))


def test_nothing_is_said_where_every_token_is_distinct(encoder: ChatEncoder) -> None:
    row = compared([Conversation("x:1", turns("Hi", "Yes"), label=True)], encoder).examples[0]
    assert "distinct_places" not in PreferenceCollator(encoder.control.pad)([row])
    blank = {"input_ids": [0], "labels": [IGNORE], "position_ids": [0], "document_ids": [-1]}
    assert "distinct_places" not in PreferenceCollator(encoder.control.pad)([blank])
