"""Accuracy and calibration of rewards, by hand; and the verb on a run that was really made."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_ft.cli.app import main
from gemma_ft.data.conversation import Pair, Turn
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.tokenizer import load_tokenizer
from gemma_ft.evaluate.reward import calibration, pair_sequences, reward_scores
from tests.reward import TINY


def test_figures_by_hand() -> None:
    rewards = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    found = {name: one.estimated() for name, one in reward_scores(rewards).items()}
    assert found["accuracy"].value == pytest.approx(0.5)  # one right, one wrong, a tie
    losses = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(2)), math.log(2)]
    assert found["loss"].value == pytest.approx(sum(losses) / 3)
    assert found["margin"].value == pytest.approx(-1 / 3)
    assert {one.rows for one in found.values()} == {3}


def test_a_share_of_right_pairs_alone_has_wilsons_interval() -> None:
    found = reward_scores(np.array([[1.0, 0.0]] * 10))["accuracy"].estimated()
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.7225, abs=1e-4)


def test_calibration_by_hand() -> None:
    def margin(probability: float) -> float:
        return math.log(probability / (1 - probability))

    sure = [0.55, 0.58, 0.95, 0.95, 0.97, 1 - 1e-16]
    signs = [1, -1, 1, 1, -1, 1]
    rewards = np.array([[sign * margin(min(one, 1 - 1e-12)), 0.0] for one, sign in zip(sure, signs, strict=True)])
    found = calibration(rewards)
    assert [(round(one["from"], 10), round(one["to"], 10)) for one in found] == [
        (0.5, 0.6), (0.6, 0.7), (0.7, 0.8), (0.8, 0.9), (0.9, 1.0)
    ]  # fmt: skip
    assert [one["pairs"] for one in found] == [2, 0, 0, 0, 4]
    assert found[0]["probability"] == pytest.approx(0.565)
    assert found[0]["right"]["value"] == pytest.approx(0.5)
    assert found[4]["right"]["value"] == pytest.approx(0.75)
    assert (found[1]["probability"], found[1]["right"]) == (None, None)


def test_a_tie_is_as_sure_as_a_coin_and_half_right() -> None:
    first = calibration(np.zeros((4, 2)))[0]
    assert (first["pairs"], first["probability"], first["right"]["value"]) == (4, 0.5, 0.5)


def test_rewards_that_are_drawn_from_the_law_are_calibrated() -> None:
    generator = np.random.default_rng(0)
    margins = generator.normal(0, 2, 20_000)
    swapped = generator.random(20_000) > 1 / (1 + np.exp(-margins))
    rewards = np.stack((np.where(swapped, -margins, margins), np.zeros(20_000)), axis=1)
    for one in calibration(rewards):
        assert abs(one["right"]["value"] - one["probability"]) < 0.02, one


def test_pairs_whose_half_is_too_long_are_left_out_whole() -> None:
    encoder = ChatEncoder(load_tokenizer(str(TINY)))
    prompt = (Turn("user", "Hi"),)
    short, long = ((Turn("assistant", "Yes " * count),) for count in (1, 50))
    sequences, left_out = pair_sequences(
        [Pair("one", prompt, short, long), Pair("two", prompt, short, (Turn("assistant", "No"),))],
        encoder, max_seq_len=30,
    )  # fmt: skip
    assert (len(sequences), left_out) == (1, 1)
    assert all(ids[-1] == encoder.control.end_of_turn for ids in sequences[0])


def write_pairs(path: Path, count: int = 24) -> Path:
    rows = [{"prompt": f"Meet at {n} on Monday", "chosen": f"Yes, at {n}.", "rejected": f"No, never at {n}, no."}
            for n in range(count)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("strategy", ["lora", "qlora", "full"])
def test_a_run_is_trained_evaluated_and_scored(
    strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """P22: what was logged in training is what is measured of the saved model afterwards."""
    rows, run = write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "run"
    settings = [
        "objective.kind=reward", f"output_dir={run}", f"strategy={strategy}", f"data.train={rows}", "data.eval=null",
        "data.eval_fraction=0.25", "data.max_seq_len=60", "train.max_steps=4", "train.global_batch_size=6",
        "train.micro_batch_size=3", "eval.canary=null", "checkpoint.every_steps=null", "train.learning_rate=0.001",
    ]  # fmt: skip
    assert main(["train", "sft_tiny", *settings]) == 0
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    summary = json.loads((run / "summary.json").read_text())
    assert main(["eval", str(run)]) == 0
    out = capsys.readouterr().out
    assert "Calibration: " in out
    results = json.loads((run / "eval.json").read_text())
    trained = "tuned" if strategy == "full" else "adapter"
    assert list(results["models"]) == ([trained] if strategy == "full" else [trained, "merged"])
    assert list(results["models"][trained]) == ["accuracy", "loss", "margin"]
    tolerance: dict[str, Any] = {"abs": 2e-2} if strategy == "qlora" else {"abs": 1e-4}
    assert results["models"][trained]["loss"]["value"] == pytest.approx(summary["eval_after"]["loss"], **tolerance)
    assert summary["eval_after"]["loss"] < summary["eval_before"]["loss"]
    scores = tmp_path / "scores.jsonl"
    assert main(["score", str(run), "--input", str(rows), "--output", str(scores)]) == 0
    assert "accuracy " in capsys.readouterr().out
    assert len(scores.read_text().splitlines()) == 24
    assert main(["score", str(run), "--input", str(rows), "--output", str(scores)]) == 0
    said = capsys.readouterr()
    assert f"{scores}: all 24 rows are scored; nothing to do" in said.err
    assert "accuracy " in said.out
    for verb in (["generate", "--prompt", "Hi"], ["chat"], ["serve"]):
        assert main([verb[0], str(run), *verb[1:]]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"{run}: a reward model, which gives an answer a number and writes none; gemma-ft score {run} --input ROWS "
            "--output FILE"
        )
    for option in (["--tasks", "x"], ["--metrics", "exact_match"], ["--window", "20"]):
        assert main(["eval", str(run), *option]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"{option[0]}: of answers, and a reward model writes none; leave it out"
        )
