"""Where a merge is written: what is there stays, a full disk and whatever ends it leave nothing, a run's own files
are kept.
"""

from __future__ import annotations

import resource
import shutil
from pathlib import Path
from typing import Any

import pytest

from gemma_ft.build.place import place_of
from gemma_ft.build.weights import WeightFiles
from gemma_ft.cli.app import main
from gemma_ft.errors import DiskError, UserError
from gemma_ft.export import hf_folder
from gemma_ft.export.merge.merge import merge_to_folder
from gemma_ft.recipe.run_files import RunFiles
from tests.export.conftest import Folders
from tests.export.test_merge_faults import RUN_FOLDERS, refused
from tests.export.tuned import names_in


def test_what_is_at_out_stays(folders: Folders) -> None:
    out = folders.root / "out"
    exists = "ROOT/out: exists already; choose another --out, or move it away"
    out.mkdir()
    assert refused(folders) == exists
    out.rmdir()
    out.write_text("mine")
    assert refused(folders) == exists
    out.unlink()
    out.symlink_to(folders.root / "nowhere")
    with pytest.raises(UserError, match="exists already"):
        merge_to_folder(place_of(folders.adapter), out)
    assert out.is_symlink()
    assert not (folders.root / "nowhere").exists()


def test_a_place_that_is_no_folder(folders: Folders) -> None:
    (folders.root / "file").write_text("mine")
    with pytest.raises(UserError) as caught:
        merge_to_folder(place_of(folders.adapter), folders.root / "file" / "out")
    assert str(caught.value) == (f"{folders.root}/file/out: {folders.root}/file is a file; choose another --out")


def test_too_little_space_is_told_before_anything_is_written(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_folder.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 60_000_000))
    assert refused(folders, DiskError) == (
        "ROOT/out: needs 0.0695 GB, its disk has 0.06 GB left; free some, or choose another --out"
    )


def test_a_disk_that_fills_up_leaves_nothing(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    """No file may grow above 400 kB: the embedding's shard does not fit."""
    _, hard = soft_and_hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
    try:
        code = main(["merge", str(folders.adapter), "--out", str(folders.root / "out"), "--prompts", "0"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft_and_hard)
    assert (code, capsys.readouterr()) == (
        4, ("", f"{folders.root}/out: no space left to write it; free some and run again\n")
    )  # fmt: skip
    assert names_in(folders.root) == ["adapter", "base"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a fault of ours"), UserError("told")])
def test_whatever_ends_a_merge_leaves_nothing(error: BaseException, folders: Folders) -> None:
    def fail(*_: Any) -> dict[str, Any]:
        raise error

    with pytest.raises(type(error)):
        merge_to_folder(place_of(folders.adapter), folders.root / "out", certify=fail)
    assert names_in(folders.root) == ["adapter", "base"]


def test_a_file_that_does_not_come_back_as_written(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a bad disk does between writing and reading."""
    from gemma_ft.export.merge import merge as room

    write = room.write_shards

    def damaged(folder: Path, *args: Any, **options: Any) -> list[str]:
        files = write(folder, *args, **options)
        data = bytearray((folder / files[0]).read_bytes())
        data[WeightFiles.open(folder).info("model.norm.weight").start] ^= 1
        (folder / files[0]).write_bytes(data)
        return files

    monkeypatch.setattr(room, "write_shards", damaged)
    assert refused(folders) == (
        "model.norm.weight did not come back from the disk as it was written; check the disk and run again"
    )


def test_what_appears_at_out_meanwhile_stays(folders: Folders) -> None:
    out = folders.root / "out"

    def certify(*_: Any) -> dict[str, Any]:
        out.mkdir()
        (out / "mine").write_text("mine")
        return {}

    with pytest.raises(UserError) as caught:
        merge_to_folder(place_of(folders.adapter), out, certify=certify)
    assert str(caught.value) == f"{out}: exists already; choose another --out, or move it away"
    assert names_in(folders.root) == ["adapter", "base", "out"]
    assert names_in(out) == ["mine"]


@pytest.mark.parametrize("inside", [*RUN_FOLDERS, "adapter/x", "checkpoints/step-00000001/x"])
def test_where_a_run_keeps_its_own_files_nothing_is_written(inside: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    hf_folder.check_out(run / inside, 0)
    run.mkdir()
    RunFiles(run).recipe.touch()
    (tmp_path / "link").symlink_to(run)
    for out in (run / inside, tmp_path / "link" / inside):
        with pytest.raises(UserError) as caught:
            hf_folder.check_out(out, 0)
        own = run / inside.partition("/")[0]
        assert str(caught.value) == (
            f"{out}: a run keeps its own files in {own}; choose another --out, such as {run}/merged"
        )
    hf_folder.check_out(run / "merged", 0)


def test_a_runs_own_folders_are_all_known() -> None:
    """What has no ending is a folder; the loggers' own are named by them."""
    of_run = {path.name for name, path in vars(RunFiles(Path("run"))).items() if name != "root" and not path.suffix}
    assert of_run | {"tensorboard", "wandb"} == set(RUN_FOLDERS)
