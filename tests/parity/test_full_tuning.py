"""All weights trained in float32 under bf16 autocast: gradients are as far from those in float32 as autocast's own are,
in whatever dtype the processor multiplies; accumulated, they are those of the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gemma_ft.kernels import matmul
from gemma_ft.model import linear
from tests.parity.amplified import FIRST, ours, token_rows

ROWS, TOKENS = 2, 160


def gradients(rows: Tensor, *, narrow: bool = True, micro: int = ROWS) -> dict[str, Tensor]:
    """Of the sum over micro-batches of so many rows."""
    model = ours(FIRST).train().float()
    for some in rows.split(micro):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
            loss = model(some, labels=some, num_items_in_batch=rows.numel()).loss
        loss.backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def distances(found: dict[str, Tensor], truth: dict[str, Tensor]) -> Iterator[tuple[str, float]]:
    assert found.keys() == truth.keys()
    for name, one in found.items():
        yield name, float((one - truth[name]).norm() / truth[name].norm())


@pytest.mark.parametrize("widened", [False, True])
def test_gradients_are_as_near_to_float32_as_autocasts_own(widened: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = token_rows(ROWS, TOKENS)
    truth = gradients(rows, narrow=False)
    with monkeypatch.context() as plain:
        plain.setattr(linear, "takes_trained", lambda *_: False)
        expected = dict(distances(gradients(rows), truth))
    monkeypatch.setattr(matmul, "widens", lambda: widened)
    taken: list[bool] = []
    asked = linear.takes_trained
    monkeypatch.setattr(linear, "takes_trained", lambda *given: (taken.append(asked(*given)), taken[-1])[1])
    found = dict(distances(gradients(rows), truth))
    assert taken
    assert all(taken)
    assert sum(found.values()) <= 1.05 * sum(expected.values())
    assert all(one <= 1.5 * expected[name] for name, one in found.items())


def test_accumulated_gradients_are_those_of_the_whole() -> None:
    rows = token_rows(ROWS, TOKENS)
    truth = gradients(rows, narrow=False)
    for name, one in distances(gradients(rows, narrow=False, micro=1), truth):
        assert one < 1e-5, name
    whole, parts = (dict(distances(gradients(rows, micro=micro), truth)) for micro in (ROWS, 1))
    assert sum(parts.values()) <= 1.2 * sum(whole.values())
