"""benchmarks/shared/limits.py: the FLOPs of a token, against a count by hand and against the pairs that a mask has."""

from __future__ import annotations

import pytest
import torch

from benchmarks.shared.limits import flops_per_token, keys_seen
from benchmarks.shared.turns import order, paired
from gemma_ft.families.records import PRESETS
from gemma_ft.model.attention import visible_keys


@pytest.mark.parametrize(
    ("preset", "tokens", "gigaflops"),
    [("gemma-2b", 2048, 10.67), ("gemma-2-2b", 2048, 11.34), ("gemma-2-2b", 8192, 13.25), ("gemma-2-9b", 2048, 39.75)],
)
def test_flops_of_the_published_sizes(preset: str, tokens: int, gigaflops: float) -> None:
    assert flops_per_token(PRESETS[preset].config(), [tokens], rank=16) == pytest.approx(gigaflops * 1e9, rel=1e-3)


@pytest.mark.parametrize("window", [None, 100, 2000])
def test_keys_are_those_of_the_mask(window: int | None) -> None:
    lengths = [512, 1024]
    pairs = sum(int(visible_keys(torch.arange(n), torch.arange(n), window_tokens=window).sum()) for n in lengths)
    assert keys_seen(lengths, window) == pytest.approx(pairs / sum(lengths), rel=1e-2)  # half of the diagonal apart


def test_arms_take_turns_and_ratios_are_of_pairs() -> None:
    assert list(order(["a", "b"], 3)) == ["a", "b", "b", "a", "a", "b"]
    assert paired([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == {"median": 2.0, "low": 1.5, "high": 2.5}
