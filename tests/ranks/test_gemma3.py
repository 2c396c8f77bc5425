"""Gemma 3's own parts (norms of queries and keys, two kinds of layers) on two ranks: the run is that of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_ft.families.records import PRESETS
from tests.gemma3 import preset_of, tiny_gemma3
from tests.ranks.conftest import CALM, Train, lines
from tests.ranks.test_two_ranks import FULL, RELATIVE, assert_near

STRATEGIES = {"fsdp2": (["strategy=full", "~quantize", "~adapter", "train.learning_rate=0.0003"], FULL),
              "ddp": (["quantize.double_quant=true", CALM], "adapter/adapter_model.safetensors")}  # fmt: skip


@pytest.mark.parametrize("layout", STRATEGIES)
def test_two_ranks_are_one(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    base = tiny_gemma3(tmp_path / "base")
    monkeypatch.setitem(PRESETS, "gemma-tiny", preset_of(base))
    strategy, result = STRATEGIES[layout]
    overrides = [f"model.weights={base}", *strategy, "train.max_steps=4", "eval.every_steps=null",
                 "eval.generate_rows=0", "eval.samples=0", "eval.canary=null"]  # fmt: skip
    one, two = train("one", *overrides), train("two", *overrides, ranks=2, layout=layout)
    for mine, theirs in zip(lines(one), lines(two), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=RELATIVE)
    assert_near(one / result, two / result, 2e-5)
