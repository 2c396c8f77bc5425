"""Safetensors folders: what is read and written, and one clear line for every way in which a folder can be wrong."""

from __future__ import annotations

import json
import struct
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_ft.build.located import PICKLES, Source, folder_of
from gemma_ft.build.weights import WeightFiles, write_shards
from gemma_ft.errors import UserError

NAMES = ["b.weight", "a.weight", "c.weight", "d.weight"]


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(4, 8 + n, generator=generator).to(torch.bfloat16) for n, name in enumerate(NAMES)}


def write(folder: Path, max_shard_bytes: int = 10**9, **changes: torch.Tensor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made = {**tensors(), **changes}
    infos = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in made.items()}
    write_shards(folder, infos, made.__getitem__, max_shard_bytes=max_shard_bytes)
    return folder


def refusal(folder: Path, stem: str = "model") -> str:
    with pytest.raises(UserError) as caught:
        WeightFiles.open(folder, stem)
    return str(caught.value).replace(f"{folder}", "FOLDER")


@pytest.mark.parametrize("limit", [1, 168, 10**9])
def test_what_is_written_is_read(tmp_path: Path, limit: int) -> None:
    files = WeightFiles.open(write(tmp_path, limit))
    assert files.names == sorted(NAMES)
    for name, tensor in tensors().items():
        assert torch.equal(files.tensor(name), tensor)
        info = files.info(name)
        assert (info.dtype, info.shape, info.bytes) == (tensor.dtype, tuple(tensor.shape), 2 * tensor.numel())
        assert (
            info.file.read_bytes()[info.start : info.start + info.bytes] == tensor.view(torch.uint8).numpy().tobytes()
        )
    assert sorted(name for names in files.shards.values() for name in names) == sorted(NAMES)


def test_shards_keep_to_their_limit_and_the_index_is_transformers_own(tmp_path: Path) -> None:
    files = WeightFiles.open(write(tmp_path, 168))
    assert files.shards == {
        "model-00001-of-00002.safetensors": ["a.weight", "b.weight"],
        "model-00002-of-00002.safetensors": ["c.weight", "d.weight"],
    }
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in tensors().values())
    assert set(index["weight_map"].values()) == set(files.shards)
    for file in files.shards:
        assert sum(tensor.numel() * 2 for tensor in load_file(str(tmp_path / file)).values()) <= 168


def test_only_one_shard_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive, most = 0, 0

    def forget(size: int) -> None:
        nonlocal alive
        alive -= size

    def make(name: str) -> torch.Tensor:
        nonlocal alive, most
        array = np.full((4, 8), len(name), dtype=np.float32)  # its memory is that of the tensor, and can be watched
        weakref.finalize(array, forget, array.nbytes)
        alive += array.nbytes
        most = max(most, alive)
        return torch.from_numpy(array)

    infos = {f"layer.{n}.weight": (torch.float32, (4, 8)) for n in range(9)}
    files = write_shards(tmp_path, infos, make, max_shard_bytes=300)
    assert (len(files), most, alive) == (5, 256, 0)


def test_the_fingerprint_does_not_depend_on_the_shards(tmp_path: Path) -> None:
    marks = {WeightFiles.open(write(tmp_path / str(limit), limit)).fingerprint() for limit in (1, 168, 10**9)}
    assert len(marks) == 1


def test_the_fingerprint_feels_value_dtype_shape_and_name(tmp_path: Path) -> None:
    made = tensors()
    changed = made["a.weight"].clone()
    changed[3, 8] += 1
    folders = [
        write(tmp_path / "same"),
        write(tmp_path / "value", **{"a.weight": changed}),
        write(tmp_path / "dtype", **{"a.weight": made["a.weight"].view(torch.float16)}),
        write(tmp_path / "shape", **{"a.weight": made["a.weight"].reshape(2, -1)}),
        write(tmp_path / "more", **{"e.weight": torch.zeros(1)}),
    ]
    assert len({WeightFiles.open(folder).fingerprint() for folder in folders}) == len(folders)


def test_the_fingerprint_of_a_large_tensor_feels_a_change_all_over(tmp_path: Path) -> None:
    large = torch.randn(512, 512)
    first = WeightFiles.open(write(tmp_path / "first", large=large)).fingerprint()
    assert first == WeightFiles.open(write(tmp_path / "again", large=large)).fingerprint()
    for name, other in {"scaled": large * 1.001, "noise": large + 1e-3 * torch.randn(512, 512)}.items():
        assert first != WeightFiles.open(write(tmp_path / name, large=other)).fingerprint()
    end = large.clone()
    end[-1, -1] += 1
    assert first != WeightFiles.open(write(tmp_path / "end", large=end)).fingerprint()


@pytest.mark.parametrize("suffix", PICKLES)
def test_a_pickle_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"pytorch_model{suffix}").write_bytes(b"never read")
    assert refusal(tmp_path) == (
        f"FOLDER/pytorch_model{suffix}: a pickle can run code when it is opened and is refused; "
        "convert it to safetensors where it was made"
    )


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _long_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**40) + path.read_bytes()[8:])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_cut, _long_header, _empty])
@pytest.mark.parametrize("limit", [168, 10**9])
def test_damaged_files_are_named(tmp_path: Path, damage: Callable[[Path], None], limit: int) -> None:
    write(tmp_path, limit)
    victim = sorted(tmp_path.glob("*.safetensors"))[-1]
    damage(victim)
    found = refusal(tmp_path)
    assert found.startswith(f"FOLDER/{victim.name}: damaged or cut short (")
    assert found.endswith("); fetch it again")
    assert "\n" not in found


def test_an_empty_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path) == "FOLDER: there is no model.safetensors in it, nor an index of shards"
    assert refusal(tmp_path, "adapter_model") == (
        "FOLDER: there is no adapter_model.safetensors in it, nor an index of shards"
    )


def _reindexed(folder: Path, name: str, file: str) -> Path:
    write(folder, 1)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][name] = file
    path.write_text(json.dumps(index))
    return path


@pytest.mark.parametrize("escape", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ""])
def test_an_index_that_leaves_its_folder_is_refused(tmp_path: Path, escape: str) -> None:
    _reindexed(tmp_path, "a.weight", escape)
    assert refusal(tmp_path) == (
        f"FOLDER/model.safetensors.index.json: names {escape!r}, which is not a file of this folder; "
        "do not trust this folder"
    )


def test_an_index_that_names_a_pickle_a_lost_shard_or_a_lost_tensor(tmp_path: Path) -> None:
    _reindexed(tmp_path, "a.weight", "x.bin")
    assert refusal(tmp_path) == (
        "FOLDER/model.safetensors.index.json: names 'x.bin'; only .safetensors files are opened"
    )
    _reindexed(tmp_path, "a.weight", "x.safetensors")
    assert refusal(tmp_path) == (
        "FOLDER/x.safetensors: missing, though model.safetensors.index.json names it; fetch the folder again"
    )
    _reindexed(tmp_path, "z.weight", "model-00001-of-00004.safetensors")
    assert refusal(tmp_path) == (
        "FOLDER/model-00001-of-00004.safetensors: has no tensor z.weight, though model.safetensors.index.json says so"
    )


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": []}', '{"metadata": {}}'])
def test_a_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert refusal(tmp_path) == (
        "FOLDER/model.safetensors.index.json: cannot be read as an index of shards; fetch the folder again"
    )


def test_two_models_in_one_folder_are_refused(tmp_path: Path) -> None:
    write(write(tmp_path, 1))
    assert refusal(tmp_path) == (
        "FOLDER: holds model.safetensors and model.safetensors.index.json; move away the one that is not the model"
    )


def test_stock_safetensors_folders_open(tmp_path: Path) -> None:
    save_file(tensors(), str(tmp_path / "adapter_model.safetensors"))
    assert WeightFiles.open(tmp_path, "adapter_model").names == sorted(NAMES)


def test_a_folder_is_its_own_and_an_absent_hub_id_is_one_line(tmp_path: Path) -> None:
    assert folder_of(Source(str(tmp_path), None)) == tmp_path
    with pytest.raises(UserError) as caught:
        folder_of(Source("no-such-owner/no-such-model", None), downloaded=True)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("no-such-owner/no-such-model: ")
