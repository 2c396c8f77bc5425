"""lm-evaluation-harness: every request of three kinds of local tasks, item by item against the harness's own hf backend
with stock transformers on the same folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.errors import UserError
from gemma_ft.families.chat_template import TURNS
from gemma_ft.system.limits import IGNORE
from gemma_ft.system.shipped import shipped_root
from tests.evaluate.conftest import CONTEXT, OPEN, ROWS

pytest.importorskip("lm_eval", reason="the harness is an extra: pip install 'gemma-ft[eval]'")

from gemma_ft.evaluate.harness_model import NativeLM

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Callable[[bool], Any]:
    """The harness's hf backend: stock transformers in float32, with or without the tokenizer's BOS."""
    from lm_eval.models.huggingface import HFLM

    made: dict[bool, Any] = {}

    def make(add_bos: bool) -> Any:
        if add_bos not in made:
            loaded = made[not add_bos].model if made else str(folder)
            made[add_bos] = HFLM(
                loaded, tokenizer=str(folder), device="cpu", dtype="float32", batch_size=3, add_bos_token=add_bos
            )
        return made[add_bos]

    return make


def test_choices_score_as_on_the_hf_backend(
    model: Any, encoder: ChatEncoder, theirs: Callable[[bool], Any], requests: dict[str, list[Any]]
) -> None:
    asked = requests["local_choice"]
    mine, hf = NativeLM(model, encoder, batch_size=3), theirs(True)
    found = mine.loglikelihood(asked)
    pairs = [hf._encode_pair(*request.args) if request.args[0] else None for request in asked]
    long = [number for number, pair in enumerate(pairs) if pair is not None and sum(map(len, pair)) > CONTEXT + 1]
    assert len(found) == 24
    assert mine.truncated == len(long) == 4  # all choices of the longest question
    expected = hf.loglikelihood(asked, disable_tqdm=True)
    assert all(found[number] != pytest.approx(expected[number], abs=1e-3) for number in long)  # hf drops their BOS
    for number, one in zip(long, with_bos(hf, [pairs[number] for number in long], encoder), strict=True):
        expected[number] = one
    for (total, greedy), (their_total, their_greedy) in zip(found, expected, strict=True):
        assert total == pytest.approx(their_total, abs=1e-4)
        assert greedy == their_greedy
    context = ROWS["open"][0]["question"]
    said = mine.generate_until([request_like(asked[0], (context, {"until": ["\n"], "max_gen_toks": 6}))])
    likeliest = [request_like(asked[0], (context, said[0])), request_like(asked[0], (context, said[0] + " not"))]
    assert [greedy for _, greedy in mine.loglikelihood(likeliest)] == [True, False]
    assert [greedy for _, greedy in theirs(True).loglikelihood(likeliest, disable_tqdm=True)] == [True, False]


def with_bos(hf: Any, pairs: list[tuple[list[int], list[int]]], encoder: ChatEncoder) -> list[tuple[float, bool]]:
    """The harness's own scores of what stays of pairs that are too long, when BOS stays before it."""
    bos = encoder.control.bos
    cut = [((" ", " "), [bos, *[*context, *said][-CONTEXT : -len(said)]], said) for context, said in pairs]
    return hf._loglikelihood_tokens(cut, disable_tqdm=True)


def test_rolling_texts_score_as_on_the_hf_backend(
    model: Any, encoder: ChatEncoder, theirs: Callable[[bool], Any], requests: dict[str, list[Any]]
) -> None:
    """With its tokenizer's BOS off: its prefix is the one BOS then, as ours always is. Of a text longer than a context
    it reads the later windows without any.
    """
    asked = requests["local_rolling"]
    mine = NativeLM(model, encoder, batch_size=3)
    found = mine.loglikelihood_rolling(asked)
    expected = theirs(False).loglikelihood_rolling(asked, disable_tqdm=True)
    windows = list(mine._windows(mine.tok_encode(asked[2].args[0], add_special_tokens=False)))
    assert len(windows) > 2
    assert found[2] != pytest.approx(expected[2], abs=0.1)
    expected[2] = sum(  # one by one: it takes windows of the same tokens, however many of them are scored, for one
        theirs(False)._loglikelihood_tokens([((" ", " "), *window)], disable_tqdm=True)[0][0] for window in windows
    )
    assert found == pytest.approx(expected, abs=1e-4, rel=1e-6)
    twice = theirs(True).loglikelihood_rolling(asked, disable_tqdm=True)
    assert found[1] != pytest.approx(twice[1], abs=1)
    assert found[3] == 0
    spelled = [request_like(asked[0], (TURNS.bos + asked[0].args[0],))]
    assert NativeLM(model, encoder, batch_size=3).loglikelihood_rolling(spelled) == pytest.approx(found[:1], abs=1e-4)


@pytest.mark.parametrize("tokens", [0, 1, 4, 5, 7, 8, 9, 11])
def test_every_window_of_a_rolling_text_begins_with_bos_and_is_full(tokens: int, encoder: ChatEncoder) -> None:
    bos, ids = encoder.control.bos, list(range(100, 100 + tokens))
    windows = list(NativeLM(None, encoder, batch_size=1, max_length=4)._windows(ids))
    if tokens == 9:
        assert windows == [
            ([bos], [100, 101, 102, 103]), ([bos, 103], [104, 105, 106]), ([bos, 105, 106], [107, 108])
        ]  # fmt: skip
    assert [one for _, scored in windows for one in scored] == ids
    assert [context.count(bos) for context, _ in windows] == [1] * len(windows)
    assert all(context[0] == bos for context, _ in windows)
    assert {len(context) + len(scored) for context, scored in windows} <= {5 if tokens >= 4 else tokens + 1}


def test_what_is_too_long_is_read_behind_bos(encoder: ChatEncoder) -> None:
    """The last tokens that fit, with the one BOS that every training chunk begins with; what fits is left alone."""
    bos = encoder.control.bos
    lm = NativeLM(None, encoder, batch_size=1, max_length=32)
    long, said = lm.tok_encode("word " * 60), lm.tok_encode(" Paris", add_special_tokens=False)
    piece = lm._piece(long, said, 0)
    assert piece.input_ids == [bos, *[*long, *said][-32:]]
    assert piece.labels == [IGNORE] * (33 - len(said)) + said
    all_of_it = list(range(200, 232))  # nothing but BOS goes before it
    assert lm._piece(long, all_of_it, 0).input_ids == [bos, *all_of_it]
    options = {"until": ["x"], "max_gen_toks": 4}
    assert lm._request("word " * 60, options, seed=1)[0].prompt_ids == [bos, *long[-27:]]
    assert lm._request(TURNS.bos + "word " * 60, options, seed=1)[0].prompt_ids == [bos, *long[-27:]]
    assert lm.truncated == 4
    assert lm._request("word", options, seed=1)[0].prompt_ids == lm.tok_encode("word")
    fits = lm.tok_encode("word")
    assert lm._piece(fits, said, 0).input_ids == [*fits, *said]
    assert lm.truncated == 4
    with pytest.raises(UserError, match="leaves no room for a prompt"):
        lm._request("word", {**options, "max_gen_toks": 31}, seed=1)


def test_answers_are_those_of_the_hf_backend(
    model: Any, encoder: ChatEncoder, theirs: Callable[[bool], Any], requests: dict[str, list[Any]]
) -> None:
    asked = requests["local_open"]
    mine, hf = NativeLM(model, encoder, batch_size=3), theirs(True)
    found = mine.generate_until(asked)
    assert found[:-1] == hf.generate_until(asked[:-1], disable_tqdm=True)
    assert len(set(found)) > 2
    assert mine.truncated == 1
    long = request_like(asked[-1], (asked[-1].args[0] + " a", {"until": ["@"], "max_gen_toks": 10}))
    kept = torch.tensor([[encoder.control.bos, *mine.tok_encode(long.args[0])[-(CONTEXT - 11) :]]])
    said = hf.model.generate(kept, max_new_tokens=10, do_sample=False, eos_token_id=list(encoder.stop_ids))
    expected = mine.tokenizer.decode(said[0, kept.shape[1] :], skip_special_tokens=True)
    assert mine.generate_until([long]) == [expected]
    assert expected


def test_the_end_of_a_turn_is_no_part_of_an_answer(
    model: Any, encoder: ChatEncoder, theirs: Callable[[bool], Any], requests: dict[str, list[Any]], tmp_path: Path
) -> None:
    """The hf backend writes it into the text, where the tokenizer does not hold it for special."""
    from lm_eval.models.huggingface import HFLM

    tiny = shipped_root() / "data" / "gemma-tiny"
    spec = json.loads((tiny / "tokenizer.json").read_text())
    spec["added_tokens"] = [{**token, "special": token["id"] < 4} for token in spec["added_tokens"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    shutil.copy(tiny / "tokenizer_config.json", tmp_path)
    stock = HFLM(theirs(True).model, tokenizer=str(tmp_path), device="cpu", batch_size=3, add_bos_token=True)
    asked = [request_like(requests["local_open"][0], (OPEN[3], {"until": ["\n"], "max_gen_toks": 20}))]
    found = NativeLM(model, encoder, batch_size=3).generate_until(asked)
    expected = stock.generate_until(asked, disable_tqdm=True)
    assert found == [text.removesuffix(TURNS.end_of_turn) for text in expected]
    assert expected[0].endswith(TURNS.end_of_turn)


def request_like(request: Any, arguments: tuple[Any, ...]) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=request.request_type, doc={}, arguments=arguments, idx=0)


def test_results_do_not_depend_on_the_batch(model: Any, encoder: ChatEncoder, requests: dict[str, list[Any]]) -> None:
    one, many = NativeLM(model, encoder, batch_size=1), NativeLM(model, encoder, batch_size=16)
    asked = requests["local_choice"]
    assert [total for total, _ in one.loglikelihood(asked)] == pytest.approx(
        [total for total, _ in many.loglikelihood(asked)], abs=1e-4
    )
    assert one.generate_until(requests["local_open"]) == many.generate_until(requests["local_open"])


def test_drawn_answers_are_drawn_again(model: Any, encoder: ChatEncoder, requests: dict[str, list[Any]]) -> None:
    drawn = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "max_gen_toks": 6}
    asked = [request_like(requests["local_open"][0], ("Hello", drawn)) for _ in range(3)]
    lm = NativeLM(model, encoder, batch_size=3)
    found = lm.generate_until(asked)
    assert found == lm.generate_until(asked)
    assert len(set(found)) > 1
    greedy = [request_like(one, ("Hello", {**drawn, "do_sample": False})) for one in asked]
    assert len(set(lm.generate_until(greedy))) == 1
