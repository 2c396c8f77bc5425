"""Pairs and labelled answers on two ranks: the run is that of one, its blank micro-batches and KTO's baseline too."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks.conftest import CALM, Train, lines
from tests.ranks.test_two_ranks import FULL, RELATIVE, assert_near
from tests.train.preference_runs import write_pairs

WITHIN = 2e-6  # a loss is of differences of sums of log-probabilities, each some 1e-5 apart in float32, times beta
ADAPTER = "adapter/adapter_model.safetensors"
LORA = ["strategy=lora", CALM]
FULL_TUNING = ["strategy=full", "~quantize", "~adapter", "train.learning_rate=0.0003"]
RUNS = {
    "dpo, ddp": ("dpo", "ddp", LORA, ADAPTER),
    "dpo, fsdp2": ("dpo", "fsdp2", LORA, ADAPTER),
    "kto, ddp": ("kto", "ddp", LORA, ADAPTER),
    "kto, fsdp2": ("kto", "fsdp2", LORA, ADAPTER),
    "dpo, computed before": ("dpo", "fsdp2", FULL_TUNING, FULL),
}


@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_are_one(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str) -> None:
    """Five pairs in steps of four: the last step of an epoch leaves a rank without a row. Figures and the held-out
    score are those of all ranks.
    """
    kind, layout, strategy, result = RUNS[run]
    pairs = write_pairs(tmp_path / "pairs.jsonl", 5)
    settings = [
        f"objective.kind={kind}", f"data.train={pairs}", f"data.eval={pairs}", "eval.overlap=allow", *strategy,
        "train.precision=float32", "train.max_steps=3", "train.global_batch_size=4", "eval.every_steps=3",
        "eval.generate_rows=0", "eval.samples=0", "eval.canary=null",
    ]  # fmt: skip
    monkeypatch.setenv("GEMMA_FT_CACHE", str(tmp_path / "one-cache"))
    one = train("one", *settings)
    monkeypatch.setenv("GEMMA_FT_CACHE", str(tmp_path / "two-cache"))
    two = train("two", *settings, ranks=2, layout=layout)
    named = {"rewards/margins": 5e-6, "rewards/chosen": 5e-6, "logps/chosen": 1e-3, "kl": 5e-5, "lengths/chosen": 1e-9}
    for mine, theirs in zip(lines(one), lines(two), strict=True):
        assert (mine["step"], mine["tokens"]) == (theirs["step"], theirs["tokens"])
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=RELATIVE, abs=WITHIN)
        for name, within in named.items():
            assert mine.get(name) == pytest.approx(theirs.get(name), abs=within), name
    assert lines(one)[0]["loss"] != lines(one)[2]["loss"]
    for mine, theirs in zip(lines(one, "evals.jsonl"), lines(two, "evals.jsonl"), strict=True):
        assert mine["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5)
    assert_near(one / result, two / result, 2e-5)
