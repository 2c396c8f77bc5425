"""Loading on several ranks takes about one copy of the model in its stored form, over all ranks together."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from gemma_ft.adapters.lora import add_adapter
from gemma_ft.build.empty_weights import empty_base
from gemma_ft.build.located import Source
from gemma_ft.build.pretrained import load_base
from gemma_ft.families.records import PRESETS
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.train.distributed import join_world
from gemma_ft.train.fsdp import shard
from tests.forked import fork, fork_ranks, no_survivors

SHAPE = {"num_hidden_layers": 6, "hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 2048}
LARGEST = 4096 * 1024 * 2  # bytes of the largest tensor, in bf16
SLACK = 40 * 2**20  # per rank: gloo's buffers, the adapter, what allocators keep


def memory(key: str) -> int:
    """VmRSS or VmHWM (the most so far) of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{key}:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 110 million weights in bf16, in several shards; written by another process, for this one forks."""
    target = tmp_path_factory.mktemp("large") / "model"

    def write() -> None:
        model = GemmaForCausalLM(PRESETS["gemma-2-2b"].config(**SHAPE)).to(torch.bfloat16)
        model.save_pretrained(str(target), max_shard_size="50MB")

    child = fork(write, target.parent / "said.txt")
    assert child.wait() == 0, child.said
    return target


def stored(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize(("kind", "share"), [(None, 1.0), ("nf4", 0.3)])
@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_together_hold_one_copy(
    folder: Path, tmp_path: Path, kind: str | None, share: float, ranks: int
) -> None:
    source = Source(str(folder), None)

    def load() -> None:
        world = join_world()
        before = memory("VmRSS")
        model = empty_base(source, dtype=torch.bfloat16, quantize=kind)  # type: ignore[arg-type]
        model = add_adapter(
            model, rank=8, alpha=16, dropout=0.0, targets="all-linear", rslora=False, dora=False, init="default",
            base=source.name, revision=None,
        )  # fmt: skip
        shard(model, source, world)
        (tmp_path / f"{world.rank}.json").write_text(json.dumps([memory("VmHWM") - before, memory("VmRSS") - before]))
        world.gather(world.rank)  # no rank leaves before all have measured
        world.close()

    children = fork_ranks(ranks, load, tmp_path, layout="fsdp2")
    with no_survivors(children):
        assert [child.wait() for child in children] == [0] * ranks, "".join(child.said for child in children)
    most, now = zip(*(json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)), strict=True)
    whole = share * stored(folder)
    print(f"{kind} on {ranks} ranks: one copy {whole / 1e6:.0f} MB, peaks {[round(one / 1e6) for one in most]} MB")
    assert sum(now) <= whole + ranks * SLACK
    # rank 0 reads and cuts one tensor at a time; bitsandbytes quantizes it on the CPU in float32 and with indices
    assert sum(most) <= whole + ranks * SLACK + (14 if kind else 6) * LARGEST


def test_without_sharding_each_rank_would_hold_one(folder: Path, tmp_path: Path) -> None:
    """What the bound of the test above is worth: an ordinary load is far over a rank's share of it."""

    def load() -> None:
        before = memory("VmRSS")
        model = load_base(Source(str(folder), None), dtype=torch.bfloat16)
        assert sum(float(one.sum()) for one in model.parameters()) != 0  # files are mapped, and read when they are used
        (tmp_path / "one.json").write_text(json.dumps(memory("VmRSS") - before))

    child = fork(load, tmp_path / "said.txt")
    assert child.wait() == 0, child.said
    assert json.loads((tmp_path / "one.json").read_text()) > 0.9 * stored(folder)
    assert stored(folder) > 3 * SLACK
