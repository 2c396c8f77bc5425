"""`gemma-ft checkpoints`: what is there, what is damaged, what is removed; and options of `train` that do not go
together.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_ft.cli.app import main
from gemma_ft.system.files import commit_folder, write_json
from gemma_ft.train.checkpoints import checkpoint_folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    root = tmp_path / "run"
    root.mkdir()
    (root / "recipe.yaml").write_text("{}")
    for step in (10, 20, 30):
        commit_folder(
            checkpoint_folder(root / "checkpoints", step),
            lambda folder, step=step: write_json(folder / "state.json", {"step": step, "last_loss": 1.5}),  # type: ignore[misc]
        )
    return root


def damage(run: Path, step: int) -> None:
    path = checkpoint_folder(run / "checkpoints", step) / "state.json"
    path.write_text(path.read_text() + " ")


def kept(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_they_are_listed_and_verified(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", str(run)]) == 0
    out = capsys.readouterr().out
    assert [line.split("│")[1].strip() for line in out.splitlines() if "1.5000" in line] == ["10", "20", "30"]
    assert main(["checkpoints", str(run), "--verify"]) == 0
    assert capsys.readouterr().out.count("yes") == 3
    damage(run, 20)
    assert main(["checkpoints", str(run), "--verify"]) == 3
    assert "state.json is damaged" in capsys.readouterr().out


def test_old_and_damaged_ones_are_removed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "step-00000020").rename(run / "checkpoints" / "step-00000020.damaged")
    assert main(["checkpoints", str(run), "--prune", "1"]) == 0
    assert kept(run) == ["step-00000030"]
    assert capsys.readouterr().out.splitlines()[-1] == "removed 2: step-00000010, step-00000020.damaged"


def test_nothing_is_removed_for_a_damaged_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(run, 30)
    assert main(["checkpoints", str(run), "--prune", "1"]) == 3
    assert len(kept(run)) == 3
    assert capsys.readouterr().err == (
        f"{run / 'checkpoints'}: nothing is removed, for the newest is not whole: state.json is damaged\n"
    )


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"{tmp_path}: not a run, there is no recipe.yaml in it; give a run directory\n"
    (tmp_path / "recipe.yaml").write_text("{}")
    assert main(["checkpoints", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--nproc", "2"], "--nproc: says how many ranks --launch starts; add --launch NAME"),
        (["--allow-drift", "data"], "--allow-drift: nothing can differ from a run that is not resumed; add --resume"),
        (["--launch", "fsdp"], "--launch: fsdp: no such file, and no shipped config; did you mean fsdp2?"),
        (
            ["--launch", "x"],
            "--launch: x: no such file, and no shipped config; there are cpu_2ranks, ddp, fsdp2, fsdp2_offload, "
            "fsdp2_qlora, multi_node, one_device",
        ),
    ],
)
def test_options_that_do_not_go_together(
    words: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "sft_tiny", f"output_dir={tmp_path / 'out'}", *words]) == 2
    assert capsys.readouterr() == ("", line + "\n")
    assert not (tmp_path / "out").exists()
