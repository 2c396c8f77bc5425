"""Whatever a page of the project names is there: links, files, tests, targets, modules, verbs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from gemma_ft.cli.app import build_app

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md")])
BASES = (ROOT, ROOT / "gemma_ft", ROOT / "tests", ROOT / "gemma_ft" / "model")  # what names on a page may start from
TOPS = ("accelerate_configs", "benchmarks", "data", "docs", "findings", "gemma_ft", "recipes", "tests")
ROOMS = sorted(path.name for path in (ROOT / "gemma_ft").iterdir() if path.is_dir() and not path.name.startswith("_"))
CODE = (".py", ".sh", ".h", ".cpp")
FOREIGN = ("vllm/", "src/models/", "gemma/", "models/gemma")  # files of other projects, by the paths they have there
FOREIGN_NAMES = {("exporting.md", "gemma2.py")}
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def spans(page: Path) -> Iterator[str]:
    """What stands in backticks on a page, code blocks left out."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    yield from re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def broken_links(page: Path) -> list[str]:
    found = []
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / target).resolve() if target else page
        if not file.exists():
            found.append(target)
        elif anchor and anchor not in anchors(file):
            found.append(f"{target}#{anchor}")
    return found


def broken_paths(page: Path) -> list[str]:
    """Files, folders and tests in backticks that are nowhere; `…::test_x` is a test of the file named before it."""
    found, file = [], ""
    for span in spans(page):
        match = re.fullmatch(r"((?:\.\./)?[\w./-]+|…)(?:::([\w*]+))?", span)
        if not match:
            continue
        path, test = match.groups()
        path = file if path == "…" else path
        code = path.endswith(CODE)
        ours = code or (path.split("/")[0] in (*TOPS, *ROOMS) and "/" in path.strip("/"))
        if not ours or path.startswith(FOREIGN) or (page.name, path) in FOREIGN_NAMES:
            continue
        file = path
        files = [base / path for base in (page.parent, *BASES) if (base / path).exists()]
        there = any(fnmatch(one, test) for each in files for one in names_of_tests(each)) if test else bool(files)
        if not there:
            found.append(span)
    return found


def names_of_tests(file: Path) -> list[str]:
    return re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_file_and_test_in_backticks_exists(page: Path) -> None:
    assert broken_paths(page) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_make_target_and_module_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, re.M)
    modules = re.findall(r"python3? -m ((?:gemma_ft|benchmarks|tests)[\w.]*)", text)
    assert [target for target in targets if target not in TARGETS] == []
    files = {module: ROOT / module.replace(".", "/") for module in modules}
    assert [module for module, file in files.items() if not (file.is_dir() or file.with_suffix(".py").is_file())] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_verb_exists(page: Path) -> None:
    app = build_app()
    verbs = {*(one.name for one in app.registered_commands), *(one.name for one in app.registered_groups)}
    text = re.sub(r"^```python\n.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    named = re.findall(r"(?:`|^ *(?:\S*bin/|\$ )?)gemma-ft ([a-z]+)", text, re.M)
    assert [verb for verb in named if verb not in verbs] == []


def test_every_make_target_is_in_the_table_of_contributing() -> None:
    table = re.findall(r"`make ([a-z-]+)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("##")[1])
    assert sorted(table) == sorted(set(TARGETS) - {"help", "clean"})


def test_a_broken_page_is_seen(tmp_path: Path) -> None:
    """The finders themselves."""
    page = tmp_path / "page.md"
    page.write_text(
        "# A head\n[a](#a-head) [b](#b-head) [c](gone.md) [d](https://x.invalid/gone)\n"
        "`gemma_ft/gone.py` `kernels/gone` `kernels/rms_norm.py` `vllm/gone.py` `adapter/`\n"
        "`parity/test_forward.py::test_gone` `…::test_the_loss_*` `…::test_lost` `tests/real`\n"
    )
    assert broken_links(page) == ["#b-head", "gone.md"]
    assert broken_paths(page) == [
        "gemma_ft/gone.py", "kernels/gone", "parity/test_forward.py::test_gone", "…::test_lost"]  # fmt: skip
