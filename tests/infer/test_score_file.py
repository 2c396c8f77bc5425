"""A file of rewards: each row's own, whatever is read with it and however the work was cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_ft.build.place import place_of
from gemma_ft.data.conversation import Conversation, Turn
from gemma_ft.errors import DataError, InterruptedWork, UserError
from gemma_ft.infer.batch_file import identity_of
from gemma_ft.infer.score_file import ScoreFile
from gemma_ft.infer.scorer import Scorer, open_scorer, scored_ids
from gemma_ft.infer.session import open_session
from tests.reward import TINY, save_reward_adapter

PAIRS = [
    {"id": n, "prompt": f"Meet Anna at {n}" + " or later" * (n % 4), "chosen": "Yes. " * (n + 1), "rejected": "No."}
    for n in range(7)
]
CHATS = [
    {"messages": [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair["chosen"]}]}
    for pair in PAIRS
]
COMPLETIONS = [{"prompt": pair["prompt"], "completion": pair["chosen"], "reward": "mine"} for pair in PAIRS]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    return open_scorer(save_reward_adapter(tmp_path_factory.mktemp("reward") / "adapter"))


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def work(tmp_path: Path, rows: list[Any], scorer: Scorer, **more: Any) -> ScoreFile:
    return ScoreFile(write(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl", identity_of(scorer.place), **more)


def alone(scorer: Scorer, prompt: str, answer: str) -> float:
    """The reward of one answer, read by hand at the end of its turn, in the whole encoding with what stands behind."""
    turns = (Turn("user", prompt), Turn("assistant", answer))
    ids = scorer.encoder.encode(Conversation("here", turns)).input_ids
    at = max(place for place, id in enumerate(ids) if id == scorer.encoder.control.end_of_turn)
    assert at < len(ids) - 1, "a line end stands behind it"
    with torch.no_grad():
        native = scorer.model.get_base_model()
        states = native.model(torch.tensor([ids]), use_cache=False).last_hidden_state
        return float(native.score(states[0, at]))


def test_pairs_have_the_rewards_of_both_halves(scorer: Scorer, tmp_path: Path) -> None:
    found = work(tmp_path, PAIRS, scorer).run(scorer, batch_size=4)
    lines = read(tmp_path / "out.jsonl")
    assert [list(line) for line in lines] == [[*PAIRS[0], "reward_chosen", "reward_rejected", "index"]] * len(PAIRS)
    for pair, line, two in zip(PAIRS, lines, found, strict=True):
        assert (line["reward_chosen"], line["reward_rejected"]) == two
        for half in ("chosen", "rejected"):
            expected = alone(scorer, str(pair["prompt"]), str(pair[half]))
            assert line[f"reward_{half}"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert len({round(line["reward_chosen"], 3) for line in lines}) == len(PAIRS)


@pytest.mark.parametrize("rows", [CHATS, COMPLETIONS])
def test_answers_alone_have_the_same_rewards(rows: list[Any], scorer: Scorer, tmp_path: Path) -> None:
    made = work(tmp_path, rows, scorer)
    name = "reward_" if "reward" in rows[0] else "reward"
    assert made.notes == (["the rows have a field 'reward'; ours is 'reward_'"] if name == "reward_" else [])
    made.run(scorer, batch_size=3)
    for pair, line in zip(PAIRS, read(tmp_path / "out.jsonl"), strict=True):
        expected = alone(scorer, str(pair["prompt"]), str(pair["chosen"]))
        assert line[name] == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kept", [0, 1, 3, len(PAIRS) - 1])
def test_cut_anywhere_it_goes_on_to_the_same_bytes(kept: int, scorer: Scorer, tmp_path: Path) -> None:
    work(tmp_path, PAIRS, scorer).run(scorer, batch_size=4)
    path = tmp_path / "out.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:kept]) + lines[kept][:10])
    found = work(tmp_path, PAIRS, scorer).run(scorer, batch_size=4)
    assert path.read_bytes() == whole
    assert len(found) == len(PAIRS)


def test_an_interrupt_keeps_what_is_done(scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def stopping(self: Scorer, sequences: Any, *, batch_size: int) -> list[float]:
        calls.append(len(sequences))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [0.5] * len(sequences)

    monkeypatch.setattr(Scorer, "rewards", stopping)
    with pytest.raises(InterruptedWork) as stopped:
        work(tmp_path, PAIRS, scorer).run(scorer, batch_size=4)
    path = tmp_path / "out.jsonl"
    assert str(stopped.value) == f"{path}: stopped with 4 of 7 rows; the same command goes on from there"
    assert len(read(path)) == 4


def test_a_system_turn_and_several_answers_end_at_the_last(scorer: Scorer) -> None:
    turns = (Turn("system", "Be short."), Turn("user", "Hi"), Turn("assistant", "Hello"), Turn("user", "More"),
             Turn("assistant", "No", train=False))  # fmt: skip
    (ids,) = scored_ids(scorer.encoder, [Conversation("here", turns)])
    end = scorer.encoder.control.end_of_turn
    assert (ids[-1], ids.count(end), ids.count(scorer.encoder.control.bos)) == (end, 4, 1)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (
            {"text": "Once upon a time"},
            "is plain text, which has no answer; give rows of messages, or of prompt and completion",
        ),
        (
            {"messages": [*CHATS[0]["messages"], {"role": "user", "content": "And?"}]},
            "turn 3: the last turn must be the assistant's, got user",
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"},
                               {"from": "human", "value": "And?"}]},
            "has an answer before its first question, or a question after its last answer; take it out",
        ),
    ],
)  # fmt: skip
def test_what_has_no_answer_at_its_end_is_refused(row: Any, told: str, scorer: Scorer, tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        work(tmp_path, [row], scorer)
    assert str(refused.value) == f"{tmp_path}/rows.jsonl:1: {told}"
    assert not (tmp_path / "out.jsonl").exists()


def test_a_row_that_is_too_long_is_named(scorer: Scorer, tmp_path: Path) -> None:
    long = {**PAIRS[0], "chosen": "word " * 3000}
    made = work(tmp_path, [PAIRS[0], long], scorer)
    with pytest.raises(DataError) as refused:
        made.run(scorer, batch_size=2)
    where, _, told = str(refused.value).partition(": ")
    assert where == f"{tmp_path}/rows.jsonl:2"
    assert told.endswith(f" tokens are more than the {scorer.max_seq_len:,} of this model")


def test_a_language_model_gives_no_rewards_and_a_reward_model_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        open_scorer(TINY)
    assert str(refused.value) == (
        f"{TINY}: a language model, which gives no rewards; name a run of objective.kind: reward, or its adapter or "
        "merged folder"
    )
    folder = save_reward_adapter(tmp_path / "adapter")
    for path, adapter in ((folder, None), (TINY, folder)):
        with pytest.raises(UserError) as refused:
            open_session(path, adapter=adapter)
        assert str(refused.value) == (
            f"{folder}: a reward model, which gives an answer a number and writes none; "
            f"gemma-ft score {folder} --input ROWS --output FILE"
        )


def test_another_model_or_other_rows_are_other_work(scorer: Scorer, tmp_path: Path) -> None:
    work(tmp_path, PAIRS, scorer).run(scorer, batch_size=4)
    assert place_of(TINY).reward is False
    with pytest.raises(UserError) as refused:
        work(tmp_path, PAIRS[:-1], scorer).run(scorer, batch_size=4)
    assert str(refused.value).startswith(f"{tmp_path}/out.jsonl:7: is not the answer to row 7; ")
