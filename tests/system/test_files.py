"""Checkpoints are whole or not there, and damage of any file is found."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from gemma_ft.build.weights import save_tensors
from gemma_ft.errors import CheckpointError, DiskError
from gemma_ft.system import files as room
from gemma_ft.system.files import MANIFEST, commit_folder, fault_of, replace_text
from gemma_ft.train.checkpoints import checkpoint_folder, newest_valid, prune


def write(folder: Path) -> None:
    save_tensors(folder / "a.safetensors", {"x": torch.arange(6.0)})
    (folder / "b.json").write_text("{}\n")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [Path.unlink, truncate, flip, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["a.safetensors", "b.json", MANIFEST])
def test_every_damage_is_found(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    folder = checkpoint_folder(tmp_path, 3)
    commit_folder(folder, write)
    assert fault_of(folder) is None
    damage(folder / name)
    assert fault_of(folder) is not None


def test_a_write_that_dies_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    commit_folder(target, write)

    def dies(folder: Path) -> None:
        (folder / "a.safetensors").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        commit_folder(target, dies)
    assert fault_of(target) is None
    commit_folder(target, write)  # the staging folder that was left is no obstacle
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_exit_code_4_and_leaves_no_staging(tmp_path: Path, error: Exception) -> None:
    def full(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise error

    with pytest.raises(DiskError) as caught:
        commit_folder(tmp_path / "adapter", full)
    assert str(caught.value) == f"{tmp_path / 'adapter'}: no space left to write it; free some and use --resume"
    assert caught.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []


def test_files_can_be_read_by_whoever_may_enter_the_folder(tmp_path: Path) -> None:
    commit_folder(tmp_path / "adapter", write)
    folder = tmp_path / "adapter"
    assert {path.stat().st_mode & 0o666 for path in folder.iterdir()} == {folder.stat().st_mode & 0o666}


def test_the_newest_valid_one_is_found(tmp_path: Path) -> None:
    said: list[str] = []
    assert newest_valid(tmp_path / "none", said.append) is None
    for step in (5, 10, 20):
        commit_folder(checkpoint_folder(tmp_path, step), write)
    (tmp_path / ".step-00000030.staging").mkdir()
    (tmp_path / "step-99").mkdir()
    flip(checkpoint_folder(tmp_path, 20) / "a.safetensors")
    assert newest_valid(tmp_path, said.append) == checkpoint_folder(tmp_path, 10)
    assert said == [
        f"{checkpoint_folder(tmp_path, 20)}: a.safetensors is damaged; set aside as step-00000020.damaged, going on "
        "from step-00000010"
    ]
    for step in (5, 10):
        (checkpoint_folder(tmp_path, step) / "b.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        newest_valid(tmp_path, said.append)
    assert str(caught.value) == f"{tmp_path}: none of the 2 checkpoints is intact; use --overwrite to start again"


def test_pruning_waits_for_a_valid_successor(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        commit_folder(checkpoint_folder(tmp_path, step), write)
    flip(checkpoint_folder(tmp_path, 3) / "b.json")
    prune(tmp_path, 1)
    assert len(list(tmp_path.iterdir())) == 3
    commit_folder(checkpoint_folder(tmp_path, 4), write)
    prune(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_a_text_that_cannot_be_written_leaves_the_old_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")

    def fail(_: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(room, "_sync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        replace_text(path, "new")
    assert {one.name: one.read_text() for one in tmp_path.iterdir()} == {"x.json": "old"}


def test_what_appears_is_on_the_disk_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Synced, then renamed, also over an older one: whatever a power cut leaves is the old or the new, whole."""
    said: list[tuple[str, int]] = []  # what was done to which inode, which a rename keeps
    fsync, rename, replace = os.fsync, Path.rename, os.replace

    def note_sync(handle: int) -> None:
        said.append(("sync", os.fstat(handle).st_ino))
        fsync(handle)

    def note_rename(path: Path, target: Path) -> Path:
        said.append(("rename", path.stat().st_ino))
        return rename(path, target)

    def note_replace(path: Path, target: Path) -> None:
        said.append(("rename", path.stat().st_ino))
        replace(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    monkeypatch.setattr(os, "replace", note_replace)
    target, text, parent = tmp_path / "adapter", tmp_path / "x.json", tmp_path.stat().st_ino
    for renames in (1, 2):  # the second time an older one is put aside
        said.clear()
        commit_folder(target, write)
        new = {path.stat().st_ino for path in (target, *target.iterdir())}
        assert {inode for _, inode in said[: len(new)]} == new
        assert [what for what, _ in said] == ["sync"] * len(new) + ["rename"] * renames + ["sync"]
        assert said[-2:] == [("rename", target.stat().st_ino), ("sync", parent)]
    for words in ("old", "new"):
        said.clear()
        replace_text(text, words)
        assert said == [("sync", text.stat().st_ino), ("rename", text.stat().st_ino), ("sync", parent)]


def test_without_replace_what_appeared_meanwhile_stays(tmp_path: Path) -> None:
    """Two that write at once: the second to finish is refused, and neither touches what the other stages."""
    target = tmp_path / "out"

    def late(folder: Path) -> None:
        write(folder)
        commit_folder(target, lambda other: save_tensors(other / "first", {}), manifest=False, replace=False)

    with pytest.raises(FileExistsError):
        commit_folder(target, late, manifest=False, replace=False)
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["out", "out/first"]
