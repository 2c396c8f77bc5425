"""Gemma 3's own parts (norms of queries and keys, two kinds of layers) on two ranks: the run is that of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gemma_ft.families.records import PRESETS
from gemma_ft.model.config import read_config
from tests.gemma3 import preset_of, tiny_gemma3
from tests.multimodal import save_multimodal
from tests.ranks.conftest import CALM, Train, lines
from tests.ranks.test_two_ranks import FULL, RELATIVE, assert_near

ADAPTER = "adapter/adapter_model.safetensors"
FULL_TUNING = ["strategy=full", "~quantize", "~adapter", "train.learning_rate=0.0003"]
STRATEGIES = {"fsdp2": (FULL_TUNING, FULL), "ddp": (["quantize.double_quant=true", CALM], ADAPTER)}
MULTIMODAL = {"full": (FULL_TUNING, FULL), "qlora": (["quantize.double_quant=true", CALM], ADAPTER)}
SIZE = "gemma-3-4b"


def assert_two_ranks_are_one(train: Train, layout: str, result: str, *overrides: str) -> None:
    settings = [*overrides, "train.max_steps=4", "eval.every_steps=null", "eval.generate_rows=0", "eval.samples=0",
                "eval.canary=null"]  # fmt: skip
    one, two = train("one", *settings), train("two", *settings, ranks=2, layout=layout)
    for mine, theirs in zip(lines(one), lines(two), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=RELATIVE)
    assert_near(one / result, two / result, 2e-5)


@pytest.mark.parametrize("layout", STRATEGIES)
def test_two_ranks_are_one(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    base = tiny_gemma3(tmp_path / "base")
    monkeypatch.setitem(PRESETS, "gemma-tiny", preset_of(base))
    strategy, result = STRATEGIES[layout]
    assert_two_ranks_are_one(train, layout, result, f"model.weights={base}", *strategy)


@pytest.mark.parametrize("strategy", MULTIMODAL)
def test_fsdp_fills_its_slices_from_a_multimodal_folder(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """Under the names that its files have, in two shards; the run's own weights have a text model's."""
    base = save_multimodal(tmp_path / "base", shard="1200KB")
    assert len(list(base.glob("*.safetensors"))) == 2
    config = read_config(base).to_dict()
    fields = {key: config[key] for key in PRESETS[SIZE].fields}
    monkeypatch.setitem(PRESETS, SIZE, replace(PRESETS[SIZE], fields=fields))
    overrides, result = MULTIMODAL[strategy]
    assert_two_ranks_are_one(train, "fsdp2", result, f"model.preset={SIZE}", f"model.weights={base}", *overrides)
