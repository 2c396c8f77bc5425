"""Pairs and labelled answers out of files in the layouts in which such data is published; what is refused, and how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemma_ft.data.conversation import Conversation, Pair, RowKind, Turn
from gemma_ft.data.read.bad_rows import BadRows
from gemma_ft.data.read.detect import detect_format
from gemma_ft.data.read.parse_rows import parse_row
from gemma_ft.data.read.sources import Row, read_chunks
from gemma_ft.errors import DataError

Said = tuple[list[str], list[str], list[str], float | None]
TIE = "a tie, and none of the answers is the better one; take the row out"


def turns(*contents: str, names: tuple[str, str] = ("user", "assistant"), keys: Any = ("role", "content")) -> Any:
    return [{keys[0]: names[at % 2], keys[1]: content} for at, content in enumerate(contents)]


def answer(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


def sharegpt(*contents: str) -> Any:
    return turns(*contents, names=("human", "gpt"), keys=("from", "value"))


def system(content: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": content}]


def read(path: Path, kind: RowKind, columns: dict[str, str] | None = None) -> tuple[str, list[Any], list[str]]:
    """(format and why, items, bad rows) of a file."""
    bad, (chunk,) = BadRows(), read_chunks(str(path))
    rows = [Row(chunk.where(offset), fields) for offset, fields in chunk.rows(bad)]
    form, why = detect_format(rows, columns, kind)
    items = [item for row in rows for item in parse_row(row, form, columns or {}, bad, rows=kind)]
    return f"{form}: {why}", items, [f"{where.removeprefix(str(path))}{': '}{reason}" for where, reason in bad.rows]


def written(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(folder: Path, row: dict[str, Any], **columns: str) -> list[Pair]:
    _, items, bad = read(written(folder, row), "pairs", columns)
    assert bad == []
    return items


def refusal(folder: Path, row: dict[str, Any], kind: RowKind = "pairs", **columns: str) -> str:
    try:
        _, items, bad = read(written(folder, row), kind, columns)
    except DataError as error:
        return str(error).removeprefix(f"{folder / 'rows.jsonl'}")
    assert items == []
    (line,) = bad
    return line


def said(pair: Pair) -> Said:
    prompt, chosen, rejected = ([turn.content for turn in one] for one in (pair.prompt, pair.chosen, pair.rejected))
    return prompt, chosen, rejected, pair.margin


ONE: Said = (["q"], ["good"], ["bad"], None)
LONG: Said = (["q", "a", "r"], ["good"], ["bad"], None)
HH = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:"
LAYOUTS: dict[str, tuple[dict[str, Any], str, list[Said]]] = {
    "TRL, text": ({"prompt": "q", "chosen": "good", "rejected": "bad"}, "chosen, rejected", [ONE]),
    "TRL, messages, prompt apart": (
        {"prompt": turns("q", "a", "r"), "chosen": answer("good"), "rejected": answer("bad")},
        "chosen, rejected",
        [LONG],
    ),
    "TRL, whole chats": (
        {"chosen": turns("q", "a", "r", "good"), "rejected": turns("q", "a", "r", "bad")},
        "chosen, rejected",
        [LONG],
    ),
    "ultrafeedback_binarized": (
        {
            "prompt": "q", "prompt_id": "x", "chosen": turns("q", "good"), "rejected": turns("q", "bad"),
            "messages": turns("q", "good"), "score_chosen": 8.5, "score_rejected": 6.0,
        },
        "chosen, rejected",
        [(["q"], ["good"], ["bad"], 2.5)],
    ),
    "orca_dpo_pairs": (
        {"system": "s", "question": "q", "chosen": "good", "rejected": "bad"},
        "chosen, rejected",
        [(["s", "q"], ["good"], ["bad"], None)],
    ),
    "argilla's Orca": (
        {
            "system": "", "input": "q", "chosen": "good", "rejected": "bad", "rating": [9.0, 7.0],
            "status": "unchanged", "chosen_score": 9.0,
        },
        "chosen, rejected",
        [ONE],
    ),
    "argilla's mix": (
        {"dataset": "x", "chosen": turns("q", "good"), "rejected": turns("q", "bad"), "chosen_rating": 5,
         "rejected_rating": 4.5},
        "chosen, rejected",
        [(["q"], ["good"], ["bad"], 0.5)],
    ),
    "OpenAI": (
        {
            "input": {"messages": turns("q"), "tools": [], "parallel_tool_calls": True},
            "preferred_output": answer("good"),
            "non_preferred_output": answer("bad"),
        },
        "preferred_output, non_preferred_output",
        [ONE],
    ),
    "LLaMA-Factory, sharegpt": (
        {
            "conversations": sharegpt("q", "a", "r"),
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        "chosen, rejected",
        [LONG],
    ),
    "LLaMA-Factory, alpaca": (
        {"instruction": "q", "input": "r", "chosen": "good", "rejected": "bad"},
        "chosen, rejected",
        [(["q\n\nr"], ["good"], ["bad"], None)],
    ),
    "hh-rlhf": ({"chosen": f"{HH} good", "rejected": f"{HH} bad"}, "chosen, rejected", [LONG]),
    "several negatives": (
        {"prompt": "q", "chosen": "good", "rejected": ["bad", "worse"], "margin": "0.5"},
        "chosen, rejected",
        [(["q"], ["good"], ["bad"], 0.5), (["q"], ["good"], ["worse"], 0.5)],
    ),
    "several negatives, messages": (
        {"prompt": turns("q"), "chosen": answer("good"), "rejected": [answer("bad"), answer("worse")]},
        "chosen, rejected",
        [ONE, (["q"], ["good"], ["worse"], None)],
    ),
    "several negatives, one list": (
        {"prompt": turns("q"), "chosen": answer("good"), "rejected": answer("bad") + answer("worse")},
        "chosen, rejected",
        [ONE, (["q"], ["good"], ["worse"], None)],
    ),
    "several negatives, whole chats": (
        {"chosen": turns("q", "good"), "rejected": [turns("q", "bad"), turns("q", "worse")]},
        "chosen, rejected",
        [ONE, (["q"], ["good"], ["worse"], None)],
    ),
    "UltraFeedback": (
        {
            "source": "x", "instruction": "q", "models": ["m", "n", "o"],
            "completions": [
                {"model": "m", "response": "bad", "overall_score": 6.0},
                {"model": "n", "response": "good", "overall_score": 7.5},
                {"model": "o", "response": "as good", "overall_score": 7.5},
            ],
        },
        "completions with overall_score",
        [(["q"], ["good"], ["bad"], 1.5)],
    ),
    "Nectar": (
        {
            "prompt": f"{HH} ", "num_responses": 3, "turns": 2,
            "answers": [
                {"answer": "good", "model": "m", "rank": 1.0},
                {"answer": "bad", "model": "n", "rank": 2.0},
                {"answer": "worse", "model": "o", "rank": 3.0},
            ],
        },
        "answers with rank",
        [LONG, (["q", "a", "r"], ["good"], ["worse"], None)],
    ),
    "stack-exchange-preferences": (
        {
            "qid": 1, "question": "q",
            "answers": [
                {"answer_id": 2, "pm_score": 1, "text": "bad"},
                {"answer_id": 3, "pm_score": 4, "text": "good"},
            ],
        },
        "answers with pm_score",
        [(["q"], ["good"], ["bad"], 3.0)],
    ),
    "stack-exchange-paired": (
        {"qid": 1, "question": "q", "response_j": "good", "response_k": "bad"},
        "response_j, response_k",
        [ONE],
    ),
    "texts beside their rewards": (
        {"prompt": "q", "responses": ["bad", "good"], "rewards": [-1, 0.5]},
        "responses with rewards",
        [(["q"], ["good"], ["bad"], 1.5)],
    ),
    "HelpSteer2": (
        {"prompt": "q", "response_1": "bad", "response_2": "good", "preference_strength": 2},
        "response_1, response_2, preference_strength",
        [(["q"], ["good"], ["bad"], 2.0)],
    ),
    "HelpSteer3": (
        {"context": turns("q"), "response1": "good", "response2": "bad", "overall_preference": -3},
        "response1, response2, overall_preference",
        [(["q"], ["good"], ["bad"], 3.0)],
    ),
    "SafeRLHF": (
        {"prompt": "q", "response_0": "bad", "response_1": "good", "better_response_id": 1},
        "response_0, response_1, better_response_id",
        [ONE],
    ),
    "SHP": (
        {"history": "q", "human_ref_A": "good", "human_ref_B": "bad", "labels": 1, "score_A": 9, "score_B": 2},
        "human_ref_A, human_ref_B, labels",
        [ONE],
    ),
    "chatbot_arena_conversations": (
        {"conversation_a": turns("q", "bad"), "conversation_b": turns("q", "good"), "winner": "model_b"},
        "conversation_a, conversation_b, winner",
        [ONE],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_each_public_layout_gives_pairs(name: str, tmp_path: Path) -> None:
    row, why, expected = LAYOUTS[name]
    told, items, bad = read(written(tmp_path, row), "pairs")
    assert bad == []
    assert told == f"preference: the rows have {why}"
    assert [said(pair) for pair in items] == expected
    for pair in items:
        assert pair.where.endswith("rows.jsonl:1")
        assert not any(turn.train for turn in pair.prompt if turn.role == "assistant")
        assert all(turn.train for half in (pair.chosen, pair.rejected) for turn in half)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_pairs_are_unpaired_for_labels(name: str, tmp_path: Path) -> None:
    row, _, expected = LAYOUTS[name]
    told, items, bad = read(written(tmp_path, row), "labelled")
    assert bad == []
    assert told.endswith("; each pair becomes two answers, a good and a bad one")
    assert [(item.turns[-1].content, item.label) for item in items] == [
        (expected[0][1][0], True),  # once, however many worse ones there are
        *((rejected[0], False) for _, _, rejected, _ in expected),
    ]


def test_pairs_say_what_becomes_of_their_halves_where_they_are_no_pairs(tmp_path: Path) -> None:
    told, _, _ = read(written(tmp_path, {"prompt": "q", "chosen": "a", "rejected": "b"}), "answers")
    why = "the chosen answers are trained, the rejected ones not used"
    assert told == f"preference: the rows have chosen, rejected; {why}"


def test_no_label_is_named_for_pairs() -> None:
    row = Row("a.jsonl:1", {"prompt": "q", "chosen": "a", "rejected": "b", "good": True})
    with pytest.raises(DataError) as caught:
        detect_format([row], {"label": "{good}"}, "labelled")
    assert str(caught.value) == (
        "a.jsonl: the rows have chosen, rejected, each of which becomes a good and a bad answer, and no label is read; "
        "take label out of data.columns"
    )


def test_halves_are_whole_conversations(tmp_path: Path) -> None:
    (pair,) = pairs(tmp_path, {"system": "s", "prompt": "q", "chosen": "good", "rejected": "bad", "extra": "x"})
    before = (Turn("system", "s"), Turn("user", "q"))
    where = pair.where
    assert pair.halves == (
        Conversation(where, (*before, Turn("assistant", "good")), unread=("extra",)),
        Conversation(where, (*before, Turn("assistant", "bad"))),
    )


def test_halves_may_be_several_turns_long(tmp_path: Path) -> None:
    row = {"chosen": turns("q", "a", "r", "b"), "rejected": turns("q", "c", "s", "d", "t", "e")}
    (pair,) = pairs(tmp_path, row)
    assert said(pair) == (["q"], ["a", "r", "b"], ["c", "s", "d", "t", "e"], None)


def test_the_head_is_of_messages_not_of_characters(tmp_path: Path) -> None:
    """P6: the halves begin alike, and with the same words; none of them belongs to the prompt."""
    (pair,) = pairs(tmp_path, {"chosen": turns("q", "The sky is blue."), "rejected": turns("q", "The sky is green.")})
    assert said(pair) == (["q"], ["The sky is blue."], ["The sky is green."], None)


def test_weights_and_columns(tmp_path: Path) -> None:
    row = {"ask": "q", "a": "good", "b": ["bad", "worse"], "w": 2, "gap": 1.5}
    columns = {"prompt": "{ask}", "chosen": "{a}", "rejected": "{b}", "weight": "{w}", "margin": "{gap}"}
    found = pairs(tmp_path, row, **columns)
    assert [(said(pair)[:3], pair.margin, pair.weight) for pair in found] == [
        ((["q"], ["good"], [bad]), 1.5, 2.0) for bad in ("bad", "worse")
    ]


PAIR = {"prompt": "q", "chosen": "good", "rejected": "bad"}
BOTH = "'chosen' and 'rejected'"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({**PAIR, "rejected": " good\n"}, f"{BOTH} are the same answer"),
    ({**PAIR, "rejected": ["bad", "good"]}, "'chosen' and 'rejected[1]' are the same answer"),
    ({"chosen": turns("q", "a"), "rejected": turns("q", "a")}, f"{BOTH} are the same answer"),
    ({**PAIR, "chosen": " \n"}, "'chosen' is empty"),
    ({**PAIR, "rejected": ""}, "'rejected' is empty"),
    ({**PAIR, "rejected": []}, "'rejected' is empty"),
    ({**PAIR, "rejected": None}, "'rejected' is null, expected text"),
    ({"chosen": turns("q", "a", "r", "b"), "rejected": turns("q", "c", "s", "")}, "'rejected' has an empty turn"),
    ({**PAIR, "prompt": " "}, "the prompt has an empty question"),
    (
        {"chosen": turns("q", "a"), "rejected": turns("r", "b")},
        f"{BOTH} differ at turn 1, which is no answer in 'chosen'; both must answer the same question",
    ),
    (
        {"chosen": turns("q", "a", "r", "b"), "rejected": turns("q", "a", "s", "b")},
        f"{BOTH} differ at turn 3, which is no answer in 'chosen'; both must answer the same question",
    ),
    (
        {"chosen": turns("q", "a", "r", "b"), "rejected": turns("q", "a")},
        "'rejected' ends after turn 2, where the other goes on; a pair needs two answers",
    ),
    (
        {"chosen": system("s") + turns("q", "a"), "rejected": system("t") + turns("q", "b")},
        f"{BOTH} have different system turns; the prompt of a pair must be one",
    ),
    (
        {"chosen": system("s") + turns("q", "a"), "rejected": turns("q", "b")},
        f"{BOTH} have different system turns; the prompt of a pair must be one",
    ),
    (
        {"prompt": "r", "chosen": turns("q", "a"), "rejected": turns("q", "b")},
        f"'prompt' is not in what {BOTH} begin with; take it out, or mend the row",
    ),
    (
        {"prompt": turns("q", "a"), "chosen": answer("b"), "rejected": answer("c")},
        "the prompt of a pair must end with a user turn, got assistant",
    ),
    (
        {"prompt": "q", "chosen": "a", "rejected": turns("q", "b")},
        "'rejected' must begin with an answer, got user",
    ),
    (
        {"chosen": turns("q", "a"), "rejected": turns("q", "b", "r")},
        "'rejected': turn 3: the last turn must be the assistant's, got user",
    ),
    (
        {"prompt": "q", "chosen": [{**answer("a")[0], "train": False}], "rejected": "b"},
        "'chosen': has no assistant turn that is to be trained ('train' or 'weight' is off in all)",
    ),
    ({**PAIR, "score_chosen": 7, "score_rejected": 7.0}, f"'score_chosen' and 'score_rejected' are both 7: {TIE}"),
    (
        {**PAIR, "chosen_score": 6, "rejected_score": 7},
        "'chosen_score' is 6, and 'rejected_score' is 7: the rejected answer would be the better one; mend the row, or "
        "name its margin with data.columns.margin",
    ),
    ({**PAIR, "status": "tie"}, f"'status' is 'tie': {TIE}"),
    ({**PAIR, "margin": -1}, "the margin 'margin' is -1, expected 0 to 1e+06"),
    ({**PAIR, "margin": True}, "'margin' is true or false, expected a number"),
    ({**PAIR, "margin": "nan"}, "'margin' is 'nan', expected a number"),
    (
        {**PAIR, "images": ["a.png"]},
        "'images' is not empty: only text can be trained, and the answer may be about what is not in it; take the row "
        "out, or the field where the text says all",
    ),
    (
        {"prompt": "q", "answers": [{"text": "a", "rank": 1}, {"text": "b", "rank": 1}]},
        f"'answers' has answers that are all equal in 'rank': {TIE}",
    ),
    (
        {"prompt": "q", "answers": [{"text": "a", "rank": 1}, {"text": "b", "rank": None}]},
        "'answers[1].rank' is null, expected a number",
    ),
    (
        {"prompt": "q", "answers": [{"text": "a", "rank": 1}, {"text": "b"}]},
        "'answers[1]' is an object, expected an object with text and rank",
    ),
    (
        {"prompt": "q", "responses": ["a", "b"], "scores": [1]},
        "'scores' is a list of 1, expected a number for each of the 2 in 'responses'",
    ),
    (
        {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": 0},
        f"'preference_strength' is 0: {TIE}",
    ),
    (
        {"conversation_a": turns("q", "a"), "conversation_b": turns("q", "b"), "winner": "tie (bothbad)"},
        f"'winner' is 'tie (bothbad)': {TIE}",
    ),
    (
        {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 2},
        "'better_response_id' is 2, expected 0 or 1",
    ),
    (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        "no field 'prompt'; the row has chosen, rejected; map it with data.columns.prompt, or give whole chats, as "
        "lists of turns, in 'chosen' and 'rejected'",
    ),
]


@pytest.mark.parametrize(("row", "reason"), REFUSED, ids=[reason[:50] for _, reason in REFUSED])
def test_what_is_no_pair_is_told_with_its_place(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, row) == f":1: {reason}"


def test_a_margin_that_is_named_needs_no_scores(tmp_path: Path) -> None:
    row = {**PAIR, "chosen_score": 6, "rejected_score": 6, "gap": 0}
    assert pairs(tmp_path, row, margin="{gap}")[0].margin == 0


GOOD = {"prompt": "q", "completion": "a", "label": True}
LABELLED: dict[str, tuple[dict[str, Any], str]] = {
    "TRL, text": (GOOD, "prompt_completion: the rows have prompt, completion, and label"),
    "TRL, messages": (
        {"prompt": turns("q"), "completion": answer("a"), "label": False},
        "prompt_completion: the rows have prompt, completion, and label",
    ),
    "whole chats": (
        {"messages": turns("p", "o", "q", "a"), "label": False},
        "messages: the rows have messages, and label",
    ),
    "LLaMA-Factory, sharegpt": (
        {"conversations": sharegpt("q", "a"), "kto_tag": True},
        "sharegpt: the rows have conversations, and kto_tag",
    ),
    "LLaMA-Factory, alpaca": (
        {"instruction": "q", "input": "", "output": "a", "kto_tag": False},
        "alpaca: the rows have instruction, output, and kto_tag",
    ),
    "numbers": (
        {**GOOD, "label": 0},
        "prompt_completion: the rows have prompt, completion, and label, in which 1 is a good answer and 0 a bad one",
    ),
    "a table": ({**GOOD, "label": "False"}, "prompt_completion: the rows have prompt, completion, and label"),
}


@pytest.mark.parametrize("name", list(LABELLED))
def test_labelled_answers(name: str, tmp_path: Path) -> None:
    row, expected = LABELLED[name]
    told, (item,), bad = read(written(tmp_path, row), "labelled")
    assert (told, bad) == (expected, [])
    assert item.label is (row.get("label", row.get("kto_tag")) is True)
    assert (item.turns[-2].content, item.turns[-1].content) == ("q", "a")
    assert [turn.train for turn in item.turns if turn.role == "assistant"][:-1] == [False] * (len(item.turns) // 2 - 1)
    assert item.unread == ()


@pytest.mark.parametrize(
    ("row", "columns", "reason"),
    [
        ({**GOOD, "label": "yes"}, {}, ":1: the label 'label' is 'yes', expected true or false, or 1 or 0"),
        ({**GOOD, "label": 2}, {}, ":1: the label 'label' is 2, expected true or false, or 1 or 0"),
        ({**GOOD, "label": -1.0}, {}, ":1: the label 'label' is -1.0, expected true or false, or 1 or 0"),
        ({**GOOD, "label": [True]}, {}, ":1: the label 'label' is a list, expected true or false, or 1 or 0"),
        ({**GOOD, "up": None}, {"label": "{up}"}, ":1: the label '{up}' is null, expected true or false, or 1 or 0"),
        ({**GOOD}, {"label": "{up}"}, ":1: no field 'up'; the row has prompt, completion, label"),
        (
            {"prompt": "q", "completion": "a"},
            {},
            ": the rows have prompt, completion, and nothing that says whether an answer is a good one; give each a "
            "label, true or false, or name its field with data.columns.label",
        ),
        (
            {"messages": [*turns("q"), {"role": "assistant", "content": "a", "train": False}], "label": True},
            {},
            ":1: has no assistant turn that is to be trained ('train' or 'weight' is off in all)",
        ),
    ],
)
def test_what_is_no_label_is_refused(row: dict[str, Any], columns: dict[str, str], reason: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, row, "labelled", **columns) == reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            GOOD,
            "the rows have prompt, completion and a label, and this objective compares two answers to one prompt; set "
            "objective.kind: kto, or give rows with prompt, chosen and rejected",
        ),
        (
            {"messages": turns("q", "a")},
            "the rows have messages, one answer each, and this objective compares two; give rows with prompt, chosen "
            "and rejected, or set objective.kind: sft",
        ),
        ({"ask": "q", "say": "a"}, "no known format has the fields ask, say; map them with data.columns"),
    ],
)
def test_rows_of_another_kind_are_refused_with_the_cure(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, row) == f": {reason}"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (
            "pairs",
            "data.format: rows of the format text have one answer, and this objective compares two; give rows with "
            "prompt, chosen and rejected, or set objective.kind: kto for answers with a label",
        ),
        (
            "labelled",
            "data.format: rows of the format text have no label, and no pair to take one from; give rows with prompt, "
            "completion and label (true or false)",
        ),
    ],
)
def test_a_format_of_another_kind_is_refused(kind: RowKind, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_row(Row("a.jsonl:1", {"text": "a"}), "text", {}, BadRows(), rows=kind)
    assert str(caught.value) == reason


def test_a_label_that_columns_name_is_heeded_where_answers_are_trained() -> None:
    bad, row = BadRows(), Row("a.jsonl:1", {"prompt": "q", "completion": "a", "up": 0})
    assert parse_row(row, "prompt_completion", {"label": "{up}"}, bad) == []
    assert bad.rows == [
        (
            "a.jsonl:1",
            "'{up}' is false: the answer is a bad one, and would be trained as a good one; take such rows out",
        )
    ]
