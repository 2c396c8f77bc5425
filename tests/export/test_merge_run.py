"""A merge while it runs: what memory holds, what is told, what appears with the folder; and one into a live model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from gemma_ft.build.place import place_of
from gemma_ft.build.weights import write_shards
from gemma_ft.export.merge.merge import merge_into, merge_to_folder, verify
from gemma_ft.export.merge.merged import merged_weights
from tests.export.test_merge import native
from tests.export.tuned import same_bytes, save_tuned
from tests.parity.amplified import SECOND, ours


@pytest.mark.parametrize(
    ("policy", "written", "loaded"),
    [
        ("original", None, torch.float32),
        ("original", torch.float32, torch.bfloat16),
        ("dequantized", None, torch.bfloat16),
        ("dequantized", torch.float32, torch.float32),
    ],
)
def test_merging_into_a_model_gives_the_bytes_of_the_folder(
    policy: Any, written: torch.dtype | None, loaded: torch.dtype, base_bf16: Path, tmp_path: Path
) -> None:
    adapter = save_tuned(tmp_path / "adapter", base_bf16, native(base_bf16, torch.float32), quantize="nf4")
    merge_to_folder(place_of(adapter), tmp_path / "merged", policy=policy, dtype=written)
    model = native(base_bf16, loaded)
    merge_into(model, merged_weights(place_of(adapter), policy=policy, dtype=written))
    expected = native(tmp_path / "merged", loaded).state_dict()
    assert all(same_bytes(tensor, expected[name]) for name, tensor in model.state_dict().items())


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, over all storages that operations have touched."""

    def __init__(self) -> None:
        super().__init__()
        self.storages, self.peak = WeakIdKeyDictionary(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                self.storages[leaf.untyped_storage()] = None
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.storages))
        return out


def test_memory_holds_one_shard_and_one_float32_tensor(tmp_path: Path) -> None:
    model = ours(SECOND, dtype=torch.bfloat16, num_hidden_layers=12)
    model.save_pretrained(tmp_path / "base", max_shard_size="400KB")
    merged = merged_weights(place_of(save_tuned(tmp_path / "adapter", tmp_path / "base", model, contract=False)))
    sizes = {name: dtype.itemsize * torch.Size(shape).numel() for name, (dtype, shape) in merged.infos.items()}
    shard, float32 = 300_000, 2 * max(sizes.values())
    assert len(merged.base.shards) > 5
    (tmp_path / "merged").mkdir()
    with LiveBytes() as live:
        files = write_shards(tmp_path / "merged", merged.infos, merged.tensor, max_shard_bytes=shard)
        verify(merged, tmp_path / "merged")
    assert len(files) > 5
    # Beside the shard and the float32 tensor: the tensor as it is read, as it is written, and the two factors.
    assert shard < live.peak <= shard + 2.5 * float32 < merged.bytes / 2


def test_on_progress_counts_every_tensor(base: Path, tmp_path: Path) -> None:
    adapter = save_tuned(tmp_path / "adapter", base, native(base, torch.float32))
    seen: list[tuple[int, int]] = []
    facts = merge_to_folder(place_of(adapter), tmp_path / "merged", on_progress=lambda *step: seen.append(step))
    assert seen == [(number, facts.tensors) for number in range(1, facts.tensors + 1)]


def test_what_is_written_beside_appears_with_the_folder(base: Path, tmp_path: Path) -> None:
    adapter = save_tuned(tmp_path / "adapter", base, native(base, torch.float32))

    def card(folder: Path, facts: Any) -> None:
        assert not (tmp_path / "merged").exists()
        (folder / "README.md").write_text(facts.policy)

    merge_to_folder(place_of(adapter), tmp_path / "merged", beside=card)
    assert (tmp_path / "merged" / "README.md").read_text() == "original"
