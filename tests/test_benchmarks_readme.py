"""benchmarks/README.md names every file and every result, each once, and the rule of their names holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
FILE, RESULT = re.compile(r"`([a-z_0-9]+\.(?:py|sh))`"), re.compile(r"`([a-z_0-9]+\.json)`")
MADE_FOR_ONE_PART = re.compile(r"gpu_[\w.-]+\.json")  # gpu.py's own, one a part

if not (FOLDER / "README.md").exists():
    pytest.skip("only in a checkout", allow_module_level=True)

ROWS = [line.split("|")[1:-1] for line in (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")]  # fmt: skip


def test_every_file_is_named_once() -> None:
    found = sorted(name for row in ROWS for name in FILE.findall(row[0]))
    assert found == sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".py", ".sh"))


def test_every_result_is_written_by_one_file() -> None:
    found = sorted(name for row in ROWS if len(row) == 5 for name in RESULT.findall(row[3]))
    there = [path.name for path in (FOLDER / "results").glob("*.json") if not MADE_FOR_ONE_PART.fullmatch(path.name)]
    assert found == sorted(there)


def test_what_measures_has_the_name_of_its_result() -> None:
    """By the README, and by the code that writes it."""
    for cells in (row for row in ROWS if len(row) == 5 and RESULT.search(row[3])):
        (file,) = FILE.findall(cells[0])
        assert RESULT.findall(cells[3])[0] == f"{Path(file).stem}.json"
        text = (FOLDER / file).read_text(encoding="utf-8")
        assert "write_result(" in text
        assert f'"{Path(file).stem}"' in text


def test_what_is_shared_writes_no_result() -> None:
    for path in (FOLDER / "shared").glob("*.py"):
        assert not re.search(r"(?<!def )write_result\(", path.read_text(encoding="utf-8")), path.name


def test_each_page_quotes_the_result_that_it_is_said_to_print() -> None:
    for cells in (row for row in ROWS if len(row) == 5):
        pages = re.findall(r"\]\((\.\./[^)]+)\)", cells[4])
        text = "".join((FOLDER / page).read_text(encoding="utf-8") for page in pages)
        for name in RESULT.findall(cells[3]) if pages else []:
            assert f"results/{name}" in text, name
