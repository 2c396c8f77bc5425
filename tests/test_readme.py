"""README.md quotes measured figures, has a line for each room of the house, names what exists, and fits a page."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatch
from pathlib import Path

from benchmarks.demo_real import in_words
from tests.test_floors import HIGHEST

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
(TREE,) = re.findall(r"^```\n(recipes/.*?)^```", README, re.M | re.S)


def test_the_figures_are_those_of_the_result_file() -> None:
    arms = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text(encoding="utf-8"))["arms"]
    demo = arms["qlora nf4 (make demo)"]
    before, after = demo["eval_before"], demo["eval_after"]
    assert f"exact match goes from {before['exact_match']:.0%} to {after['exact_match']:.0%}, " in README
    assert f"loss per token from {before['loss']:.2f} to {after['loss']:.4f}: " in README
    assert f"{demo['steps']} steps, {demo['tokens']:,} tokens in {demo['seconds']:.0f} s" in README
    for arm in arms.values():
        assert arm["eval_before"]["exact_match"] < 0.05
        assert arm["eval_after"]["exact_match"] >= 0.9


def test_the_second_paragraph_is_what_the_real_model_did() -> None:
    """Word by word: `benchmarks.demo_real` prints it."""
    found = json.loads((ROOT / "benchmarks" / "results" / "demo_real.json").read_text(encoding="utf-8"))
    paragraph = " ".join(README.split("\n\n")[2].split())
    assert paragraph.startswith(in_words(found))
    assert found["scheduling"]["eval_after"]["exact_match"] >= 0.7
    assert sum(found["seconds"].values()) - found["seconds"]["GSM8K"] <= 600


def test_it_names_what_is_there_and_fits_a_page() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
    assert len(README.replace(TREE, "").splitlines()) <= 80


def lines_of_the_tree() -> tuple[list[str], list[str]]:
    """Folders at the top, and rooms of the package, in the order of the page; each has a line of its own."""
    tops, rooms = [], []
    for line in TREE.splitlines():
        indent, name, text = re.fullmatch(r"( *)([\w./]+) +(\S.*)", line).groups()
        assert len(indent) in (0, 2), line
        assert len(line) <= 120, line
        assert len(text) > 10, line
        (rooms if indent else tops).append(name)
    return tops, rooms


def on_disk(folder: Path) -> list[str]:
    """Folders and top modules, as the tree writes them; not what git ignores, nor what is hidden, private or empty."""
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    patterns = [line.strip("/") for line in ignored if folder == ROOT or not line.startswith("/")]
    folders = [path for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._"]
    kept = [path for path in folders if not any(fnmatch(path.name, pattern) for pattern in patterns)]
    full = [path for path in kept if any(file.is_file() and file.suffix != ".pyc" for file in path.rglob("*"))]
    return [*(f"{path.name}/" for path in full), *(file.name for file in folder.glob("[!_]*.py"))]


def test_every_folder_has_its_line_and_every_line_its_folder() -> None:
    tops, _ = lines_of_the_tree()
    assert sorted(tops) == sorted(on_disk(ROOT))


def test_every_room_has_its_line_and_every_line_its_room() -> None:
    _, rooms = lines_of_the_tree()
    assert sorted(rooms) == sorted(on_disk(ROOT / "gemma_ft"))


def test_the_rooms_stand_in_the_order_of_the_floors() -> None:
    _, rooms = lines_of_the_tree()
    floors = [HIGHEST[room.strip("/").removesuffix(".py")] for room in rooms]
    assert floors == sorted(floors)
