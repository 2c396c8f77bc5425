"""docs/quickstart.ipynb runs from top to bottom, is kept without outputs, and shows the commands that there are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
QUICK = """
OVERRIDES = ["eval.every_steps=4", "train.max_steps=8", "eval.max_rows=8", "eval.generate_rows=2", "eval.samples=1"]
ROWS = 4
PROMPTS = PROMPTS[1:]
"""


def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return found


def test_it_is_kept_without_outputs() -> None:
    """Outputs hold times and paths of one machine, and make every change unreadable."""
    for cell in cells():
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


def test_one_cell_holds_what_a_user_changes() -> None:
    tagged = [cell for cell in cells() if "parameters" in cell["metadata"].get("tags", ())]
    assert len(tagged) == 1
    assert tagged[0]["source"][0] == 'RECIPE = "sft_tiny"  # or "sft_2b"\n'


@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="the dev extra brings it")
    nbclient = pytest.importorskip("nbclient", reason="the dev extra brings it")
    pytest.importorskip("ipykernel", reason="the dev extra brings it")
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = next(n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    notebook.cells[place].source += "\n" + QUICK
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    (run,) = (tmp_path / "runs").iterdir()
    for name in ("adapter", "merged", "metrics.jsonl", "eval.json", "merge.json", "report.html"):
        assert (run / name).exists(), name
    said = {
        cell.id: "".join(out.get("text", "") for out in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    assert "What was learned" in said["train"]
    assert said["forgetting"].startswith("gained on held-out rows:   +")
    assert "adapter − base" in said["eval"]
    assert "passed" in said["merge"]
    assert said["chat"].count("> study group") == 2
    assert said["report"].endswith("report.html\n")
    curves = next(cell for cell in notebook.cells if cell.get("id") == "curves")
    assert any("image/png" in out.get("data", {}) for out in curves.outputs)
