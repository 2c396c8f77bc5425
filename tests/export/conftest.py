"""Small bases, each made once; no test writes into them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from gemma_ft.build.contract import contract_of
from gemma_ft.build.located import Source
from gemma_ft.build.pretrained import load_base
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.encode.tokenizer import load_tokenizer
from gemma_ft.system import environment
from tests.export.tuned import TINY, save_base, save_tuned
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


class Folders(NamedTuple):
    """A copy of a sharded base, an adapter on it, and the folder that holds both."""

    root: Path
    base: Path
    adapter: Path


@pytest.fixture
def folders(base_bf16: Path, tmp_path: Path) -> Folders:
    shutil.copytree(base_bf16, tmp_path / "base")
    model = load_base(Source(str(base_bf16), None), dtype=torch.float32)
    adapter = save_tuned(tmp_path / "adapter", tmp_path / "base", model, quantize="nf4")
    return Folders(tmp_path, tmp_path / "base", adapter)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fully tuned model in a run (its system policy is drop), and an adapter on a base."""
    root = tmp_path_factory.mktemp("made")
    base = save_base(root / "base", "gemma-2-9b")
    shutil.copytree(base, root / "run" / "model")
    contract = contract_of(ChatEncoder(load_tokenizer(TINY), "fold"), base="/home/me/base", preset="gemma-2-9b")
    contract.write(root / "run" / "model")
    model = load_base(Source(str(base), None), dtype=torch.float32)
    save_tuned(root / "adapter", base, model)
    return root
