"""Small bases, each made once; no test writes into them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gemma_ft.system import environment
from tests.export.tuned import save_base
from tests.parity.amplified import FIRST, SECOND


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    environment.quiet_libraries()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 2 in float32, in one file."""
    return save_base(tmp_path_factory.mktemp("bases") / "second", SECOND)


@pytest.fixture(scope="session")
def base_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in bf16, in several shards."""
    return save_base(tmp_path_factory.mktemp("bases") / "bf16", SECOND, dtype=torch.bfloat16, shard="400KB")


@pytest.fixture(scope="session")
def first_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 1 in float64."""
    return save_base(tmp_path_factory.mktemp("bases") / "first", FIRST, dtype=torch.float64)
