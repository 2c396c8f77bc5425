"""Any pair, written to a file in any of the layouts that hold it, comes back as it was; its halves are encoded once
from their parts, and mean the same as the whole conversations.
"""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gemma_ft.data.conversation import Conversation, Pair, Turn, order_fault
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.read.bad_rows import BadRows
from gemma_ft.data.read.detect import detect_format
from gemma_ft.data.read.json_rows import DECODER
from gemma_ft.data.read.pairs import pair_of, split_head, unpaired
from gemma_ft.data.read.parse_rows import parse_row
from gemma_ft.data.read.sources import Row
from gemma_ft.errors import DataError
from gemma_ft.system.limits import IGNORE
from tests.data.strategies import texts

said = texts.filter(str.strip)


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    prompt = [Turn("system", draw(said))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        prompt += [Turn("user", draw(said)), Turn("assistant", draw(said), train=False)]
    prompt.append(Turn("user", draw(said)))
    halves = []
    for _ in range(2):
        half = [Turn("assistant", draw(said))]
        for _ in range(draw(st.integers(0, 1))):
            half += [Turn("user", draw(said)), Turn("assistant", draw(said))]
        halves.append(tuple(half))
    first = [half[0].content.strip() for half in halves]
    if first[0] == first[1]:  # then more would belong to the prompt
        halves[1] = (Turn("assistant", halves[1][0].content + "!"), *halves[1][1:])
    return Pair("a.jsonl:1", tuple(prompt), *halves)


def messages(turns: Any) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def layouts(pair: Pair) -> list[dict[str, Any]]:
    prompt, chosen, rejected = (messages(one) for one in (pair.prompt, pair.chosen, pair.rejected))
    rows: list[dict[str, Any]] = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected},
        {"prompt": prompt, "chosen": chosen, "rejected": [rejected]},
        {"chosen": prompt + chosen, "rejected": prompt + rejected},
        {"input": {"messages": prompt}, "preferred_output": chosen, "non_preferred_output": rejected},
        {"prompt": prompt, "responses": [rejected, chosen], "scores": [1, 2]},
        {"conversation_a": prompt + rejected, "conversation_b": prompt + chosen, "winner": "model_b"},
    ]
    if len(pair.chosen) == len(pair.rejected) == 1 and len(pair.prompt) - (pair.prompt[0].role == "system") == 1:
        row = {"question": pair.prompt[-1].content, "response_j": chosen[0]["content"],
                 "response_k": rejected[0]["content"]}  # fmt: skip
        if not any(text.lstrip().startswith("[") or "Human:" in text for text in row.values()):
            rows.append(row | ({"system": prompt[0]["content"]} if len(prompt) > 1 else {}))
    return rows


def read(fields: dict[str, Any]) -> Pair:
    bad, row = BadRows(), Row("a.jsonl:1", DECODER.decode(json.dumps(fields)))
    form = detect_format([row], kind="pairs")[0]
    found = parse_row(row, form, {}, bad, rows="pairs")
    assert bad.rows == []
    (pair,) = found
    return pair


@given(pair=pairs())
def test_every_layout_gives_the_pair_back(pair: Pair) -> None:
    for fields in layouts(pair):
        found = read(fields)
        assert (found.prompt, found.chosen, found.rejected) == (pair.prompt, pair.chosen, pair.rejected)


@given(pair=pairs())
def test_halves_are_the_prompt_and_an_answer_encoded_from_their_parts(pair: Pair, encoder: ChatEncoder) -> None:
    """P6: what is trained begins where the model is asked to answer, whatever the two answers begin with."""
    asked = encoder.encode_prompt(pair.prompt)
    for half, turns in zip(pair.halves, (pair.chosen, pair.rejected), strict=True):
        whole = encoder.encode(half)
        assert whole.input_ids[: len(asked)] == asked
        trained = [at for at, label in enumerate(whole.labels) if label != IGNORE]
        assert trained[0] == len(asked)
        ends = [at for at in trained if whole.input_ids[at] == encoder.control.end_of_turn]
        assert len(ends) == sum(turn.role == "assistant" for turn in turns)
        assert trained[-1] == ends[-1]
        assert whole.input_ids.count(encoder.control.bos) == 1


@given(pair=pairs())
def test_a_head_is_split_off_once(pair: Pair) -> None:
    chosen, rejected = (half.turns for half in pair.halves)
    head, *halves = split_head(chosen, rejected)
    assert (tuple(head), *map(tuple, halves)) == (pair.prompt, pair.chosen, pair.rejected)
    assert split_head(rejected, chosen)[1:] == (halves[1], halves[0])
    assert pair_of(pair.where, head, *halves) == pair
    assert [item.label for item in unpaired([pair])] == [True, False]


NAMES = ("prompt", "chosen", "rejected", "completion", "label", "kto_tag", "messages", "conversations", "question",
         "instruction", "input", "output", "preferred_output", "non_preferred_output", "responses", "answers", "scores",
         "completions", "rank", "response_1", "response_2", "preference_strength", "better_response_id", "response_0",
         "conversation_a", "conversation_b", "winner", "margin", "score_chosen", "score_rejected", "status", "context",
         "system", "images")  # fmt: skip
turn = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", None]), "content": st.one_of(st.none(), texts)}
)
entry = st.dictionaries(
    st.sampled_from(["response", "text", "overall_score", "rank", "messages", "content", "role", "from", "value"]),
    st.one_of(texts, st.none(), st.floats(), st.integers(), st.lists(turn, max_size=3)),
    max_size=3,
)
values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), texts, turn, entry, st.sampled_from(["tie", "model_a", "[]"]),
    st.sampled_from(["\n\nHuman: a\n\nAssistant: b", "\n\nAssistant:", "\n\nHuman:", '[{"role": "user"}]', "[1"]),
    st.lists(st.one_of(turn, texts, entry, st.none(), st.floats(), st.lists(turn, max_size=3)), max_size=4),
)  # fmt: skip


@given(fields=st.dictionaries(st.sampled_from(NAMES), values, max_size=6), kind=st.sampled_from(["pairs", "labelled"]))
def test_any_row_is_read_or_told(fields: dict[str, Any], kind: Any) -> None:
    bad, row = BadRows(), Row("a.jsonl:1", fields)
    try:
        forms = [detect_format([row], kind=kind)[0]]
    except DataError:
        forms = ["preference"] if kind == "pairs" else ["preference", "messages", "prompt_completion", "alpaca"]
    for form in forms:
        items = parse_row(row, form, {}, bad, rows=kind)
        for item in items:
            halves = item.halves if isinstance(item, Pair) else (item,)
            assert all(isinstance(half, Conversation) and order_fault(half.turns) is None for half in halves)
            assert isinstance(item, Pair) or item.label in (True, False)
    assert all("\n" not in reason for _, reason in bad.rows)
