"""Pairs and labelled answers on two ranks: the run is that of one, its blank micro-batches and KTO's baseline too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.ranks.conftest import CALM, ROOT, Train, lines
from tests.ranks.test_two_ranks import FULL, RELATIVE, assert_near
from tests.train.preference_runs import write_pairs

WITHIN = 2e-6  # a loss is of differences of sums of log-probabilities, each some 1e-5 apart in float32, times beta
ADAPTER = "adapter/adapter_model.safetensors"
LORA = ["strategy=lora", CALM]
FULL_TUNING = ["strategy=full", "~quantize", "~adapter", "train.learning_rate=0.0003"]
GOES_ON = [*LORA, "~adapter", f"adapter.start={ROOT / 'data' / 'scheduling-adapter'}"]
BOTH = ("ddp", "fsdp2")
RUNS = {
    "dpo": ("dpo", BOTH, LORA, ADAPTER),
    "dpo, computed before": ("dpo", ("fsdp2",), FULL_TUNING, FULL),
    "dpo, from an adapter": ("dpo", BOTH, GOES_ON, ADAPTER),
    "ipo": ("ipo", BOTH, LORA, ADAPTER),
    "orpo": ("orpo", BOTH, LORA, ADAPTER),
    "simpo": ("simpo", BOTH, LORA, ADAPTER),
    "kto": ("kto", BOTH, LORA, ADAPTER),
    "reward": ("reward", BOTH, LORA, ADAPTER),
    "reward, full": ("reward", ("fsdp2",), FULL_TUNING, FULL),
}


@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_are_one(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str) -> None:
    """Five pairs in steps of four: the last step of an epoch leaves a rank without a row. Figures, the held-out score
    and what is saved are those of all ranks.
    """
    kind, layouts, strategy, result = RUNS[run]
    pairs = write_pairs(tmp_path / "pairs.jsonl", 5)
    settings = [
        f"objective.kind={kind}", f"data.train={pairs}", f"data.eval={pairs}", "eval.overlap=allow", *strategy,
        "train.precision=float32", "train.max_steps=3", "train.global_batch_size=4", "eval.every_steps=3",
        "eval.generate_rows=0", "eval.samples=0", "eval.canary=null",
    ]  # fmt: skip
    monkeypatch.setenv("GEMMA_FT_CACHE", str(tmp_path / "one-cache"))
    one = train("one", *settings)
    for layout in layouts:
        monkeypatch.setenv("GEMMA_FT_CACHE", str(tmp_path / f"{layout}-cache"))
        assert_same(one, train(layout, *settings, ranks=2, layout=layout), result)


def assert_same(one: Path, two: Path, result: str) -> None:
    """Logs, scores and the saved folder of a run on one rank and on two."""
    named = {"rewards/margins": 5e-6, "rewards/chosen": 5e-6, "logps/chosen": 1e-3, "kl": 5e-5, "lengths/chosen": 1e-9}
    for mine, theirs in zip(lines(one), lines(two), strict=True):
        assert (mine["step"], mine["tokens"]) == (theirs["step"], theirs["tokens"])
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=RELATIVE, abs=WITHIN)
        for name, within in named.items():
            assert mine.get(name) == pytest.approx(theirs.get(name), abs=within), name
    assert lines(one)[0]["loss"] != lines(one)[2]["loss"]
    for mine, theirs in zip(lines(one, "evals.jsonl"), lines(two, "evals.jsonl"), strict=True):
        assert mine["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5)
    folders = [sorted(path.name for path in (run / result).parent.iterdir()) for run in (one, two)]
    assert folders[0] == folders[1]
    assert_near(one / result, two / result, 2e-5)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_the_start_is_proven_where_a_rank_has_no_row(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """One pair on two ranks of a sharded model, beside log-probabilities that were computed before: the rank without
    a row makes the passes of the other.
    """
    pairs = write_pairs(tmp_path / "pairs.jsonl", 1)
    settings = [
        f"objective.kind={kind}", f"data.train={pairs}", "data.eval=null", *FULL_TUNING, "train.precision=float32",
        "train.max_steps=1", "train.global_batch_size=4", "eval.generate_rows=0", "eval.samples=0", "eval.canary=null",
    ]  # fmt: skip
    found = []
    for ranks in (1, 2):
        monkeypatch.setenv("GEMMA_FT_CACHE", str(tmp_path / f"cache{ranks}"))
        run = train(f"run{ranks}", *settings, ranks=ranks, layout="fsdp2")
        proof = json.loads((run / "summary.json").read_text(encoding="utf-8"))["zero_proof"]
        found.append((proof["loss"], proof["answers"]))
        assert proof["largest_difference"] <= proof["allowed"]
    assert found[0] == (pytest.approx(found[1][0], abs=1e-6), found[1][1])
