"""Rows are encoded once on a machine, by its first rank; the other reads what that wrote."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from gemma_ft.cli.app import main
from tests.forked import fork_ranks, no_survivors
from tests.ranks.conftest import arguments


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_one_rank_encodes(rows: Path, tmp_path: Path, layout: str) -> None:
    def go() -> int:
        from gemma_ft.data.encode import cache

        original = cache.encode_chunk

        def encode(*given: Any) -> Any:
            assert os.environ["RANK"] == "0", "the second rank encodes"
            (tmp_path / "encoded").open("a").write("once\n")
            return original(*given)

        cache.encode_chunk = encode
        return main(arguments(rows, tmp_path / "run", "train.max_steps=1", "eval.every_steps=null"))

    told = {"GEMMA_FT_CACHE": str(tmp_path / "cache")}
    children = fork_ranks(2, go, tmp_path / "said", layout=layout, environment=told)
    with no_survivors(children):
        assert [child.wait() for child in children] == [0, 0], "".join(child.said for child in children)
    assert (tmp_path / "encoded").read_text() == "once\n"
