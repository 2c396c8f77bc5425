"""What a process may take: control groups of both versions, wherever in the tree a limit stands."""

from pathlib import Path

import pytest

from gemma_ft.system import environment
from gemma_ft.system.hardware import V1, V2, _control_groups


def told(folder: Path, text: str) -> Path:
    (folder / "cgroup").write_text(text)
    return folder / "cgroup"


def test_a_group_and_its_parents_are_asked(tmp_path: Path) -> None:
    found = list(_control_groups(tmp_path, told(tmp_path, "0::/system.slice/job_7/step_0\n")))
    places = ("system.slice/job_7/step_0", "system.slice/job_7", "system.slice", "")
    assert found == [(tmp_path / place, *V2) for place in places]


def test_version_1_has_a_tree_for_memory(tmp_path: Path) -> None:
    text = "4:cpu,cpuacct:/a\n3:memory:/slurm/job_7\n"
    found = list(_control_groups(tmp_path, told(tmp_path, text)))
    assert found == [(tmp_path / "memory" / place, *V1) for place in ("slurm/job_7", "slurm", "")]


def test_without_control_groups_none_is_asked(tmp_path: Path) -> None:
    assert list(_control_groups(tmp_path, tmp_path / "none")) == []


def test_huge_pages_are_asked_for_unless_the_user_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv(environment.HUGE_PAGES, raising=False)
    assert not environment.huge_pages()
    environment.ask_for_huge_pages()
    assert environment.huge_pages()
    monkeypatch.setenv(environment.HUGE_PAGES, "0")
    environment.ask_for_huge_pages()
    assert not environment.huge_pages()
