"""Any pair, written to a file in any of the layouts that hold it, comes back as it was; its halves are encoded once
from their parts, and mean the same as the whole conversations.
"""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gemma_ft.data.conversation import Pair, Turn
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.read.bad_rows import BadRows
from gemma_ft.data.read.detect import detect_format
from gemma_ft.data.read.json_rows import DECODER
from gemma_ft.data.read.pairs import pair_of, split_head, unpaired
from gemma_ft.data.read.parse_rows import parse_row
from gemma_ft.data.read.sources import Row
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
