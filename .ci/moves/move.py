"""Moves modules and tests to where the tables beside this file say, and rewrites every import and mention of them.

    python .ci/moves/move.py [--check]

`modules.txt` holds old and new modules below gemma_ft, `tests.txt` old and new files below tests. What is imported as a
module under its own last name takes the new one, and so do its uses in that file. What has moved already is left alone,
so that a branch of before the moves can be moved as well. Nothing but names changes; ruff sorts and wraps the imports.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PACKAGE = "gemma_ft"
TEXTS = {".py", ".md", ".ipynb", ".toml", ".txt", ".yaml", ".json", ".sh", ".cpp", ".h", ".j2", ""}
KEYS = {"gemma_ft.contract"}  # what looks like a module and is a key of GGUF


def table(name: str) -> dict[str, str]:
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split() for line in lines if line and not line.startswith("#"))


MODULES, TESTS = table("modules.txt"), table("tests.txt")
NEW = set(MODULES.values())
FOLDERS = {"infer.server", "kernels.gpu", "data.formats"}  # old rooms that move as a whole


def moved(module: str) -> str | None:
    """The new name of a module below the package, or None where it stays."""
    if module in MODULES:
        return MODULES[module]
    for old in FOLDERS:
        if module.startswith(f"{old}.") and "." not in module[len(old) + 1 :]:
            return MODULES[old] + module[len(old) :]
    return None


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.splitlines() if (ROOT / name).is_file()]


def destinations() -> dict[Path, Path]:
    """Old -> new files, of those that are still where they were."""
    found = {}
    for path in tracked():
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(f"{PACKAGE}/") and name.endswith(".py"):
            parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
            module = ".".join(parts)
            if parts[-1] == "__init__":
                where = ".".join(parts[:-1])
                new = moved(where) if where in FOLDERS else None
                if new:
                    found[path] = ROOT / PACKAGE / Path(*new.split(".")) / "__init__.py"
            elif new := moved(module):
                found[path] = ROOT / PACKAGE / Path(*new.split(".")).with_suffix(".py")
        elif name.startswith("tests/"):
            short = name.removeprefix("tests/")
            for old, new in TESTS.items():
                if short == old or short.startswith(f"{old}/"):
                    found[path] = ROOT / "tests" / (new + short[len(old) :])
    return found


def statement(module: str, names: list[tuple[str, str | None]]) -> tuple[list[str], dict[str, str]]:
    """The lines that import what `from gemma_ft.module import names` did, and which local names change."""
    kept: list[str] = []
    lines: list[str] = []
    renamed: dict[str, str] = {}
    for name, alias in names:
        whole = f"{module}.{name}" if module else name
        if whole in NEW:
            lines.append(f"from {PACKAGE}.{module} import {name}" + (f" as {alias}" if alias else ""))
            continue
        new = moved(whole)
        if new is None:
            kept.append(f"{name} as {alias}" if alias else name)
            continue
        parent, _, last = new.rpartition(".")
        lines.append(f"from {PACKAGE}.{parent} import {last}" + (f" as {alias}" if alias else ""))
        if not alias and last != name:
            renamed[name] = last
    if kept:
        home = module if module in NEW else moved(module) or module
        lines.insert(0, f"from {PACKAGE}{'.' + home if home else ''} import {', '.join(kept)}")
    return lines, renamed


def binds(scope: ast.AST, name: str) -> bool:
    """Whether a function gives `name` a value of its own: an argument, an assignment, a loop."""
    if not isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return False
    return any(
        (isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store))
        or (isinstance(node, ast.arg) and node.arg == name)
        for node in ast.walk(scope)
    )


def uses(scope: ast.AST, name: str) -> Iterator[ast.Name]:
    """Where a name is read in a scope and those inside it which do not bind it themselves."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load):
            yield node
        if not binds(node, name):
            yield from uses(node, name)


def rewritten(text: str, where: str) -> str:
    """A Python file with its imports, and the uses of the names that they bind, rewritten."""
    lines = text.encode().split(b"\n")
    edits: dict[tuple[int, int], tuple[int, int, bytes]] = {}

    def visit(node: ast.AST, scope: ast.AST) -> None:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            module = node.module.partition(".")[2]
            new, renamed = statement(module, [(alias.name, alias.asname) for alias in node.names])
            indent = "\n" + " " * node.col_offset
            edits[node.lineno, node.col_offset] = (node.end_lineno, node.end_col_offset, indent.join(new).encode())
            for old, name in renamed.items():
                if any(isinstance(other, ast.Name) and other.id == name for other in ast.walk(scope)):
                    print(f"{where}: {old} -> {name}: is a name of this file already")
                for use in uses(scope, old):
                    edits[use.lineno, use.col_offset] = (use.lineno, use.end_col_offset, name.encode())
        inner = node if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else scope
        for child in ast.iter_child_nodes(node):
            visit(child, inner)

    tree = ast.parse(text)
    visit(tree, tree)
    for (first, start), (last, end, new) in sorted(edits.items(), reverse=True):
        head, tail = lines[first - 1][:start], lines[last - 1][end:]
        lines[first - 1 : last] = (head + new + tail).split(b"\n")
    return b"\n".join(lines).decode()


IMPORT = re.compile(rf"from {PACKAGE}((?:\.\w+)*) import ([\w, ]+)")


def mentions(text: str, where: str) -> str:
    """A text with the modules and files that it names where they now are."""

    def imported(match: re.Match[str]) -> str:
        names = [name.strip().partition(" as ") for name in match[2].split(",")]
        lines, renamed = statement(match[1][1:], [(name, alias or None) for name, _, alias in names])
        if lines == [match[0]]:
            return match[0]
        if renamed:
            print(f"{where}: in a text: {match[0]} -> {lines}, {renamed}")
        return "; ".join(lines) if len(lines) > 1 else lines[0]

    def dotted(match: re.Match[str]) -> str:
        if match[0] in KEYS:
            return match[0]
        parts = match[1].split(".")
        starts = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
        if NEW.intersection(starts):
            return match[0]
        for count in range(len(parts), 0, -1):
            if new := moved(".".join(parts[:count])):
                return ".".join([PACKAGE, new, *parts[count:]])
        return match[0]

    def path(match: re.Match[str]) -> str:
        if "/" not in match[2] and not match[1]:
            return match[0]  # a file of any folder may be called so
        new = moved(match[2].replace("/", "."))
        return f"{match[1] or ''}{new.replace('.', '/')}.py" if new else match[0]

    if where.endswith((".md", ".ipynb")) or not where.endswith(".py"):
        text = IMPORT.sub(imported, text)
    text = re.sub(rf"\b{PACKAGE}\.([a-z_0-9]+(?:\.\w+)*)(?![\w.]*\w| import)", dotted, text)
    text = re.sub(rf"(?<![\w/.-])({PACKAGE}/)?((?:[a-z_0-9]+/)*[a-z_0-9]+)\.py\b", path, text)
    for old, new in TESTS.items():
        text = re.sub(rf"(?<![\w/])tests/{re.escape(old)}(?![\w])", f"tests/{new}", text)
        dots = [name.removesuffix(".py").replace("/", ".") for name in (old, new)]
        text = re.sub(rf"\btests\.{re.escape(dots[0])}(?!\w)", f"tests.{dots[1]}", text)
    return text


def embedded(text: str, where: str) -> str:
    """A Python file whose strings hold lines of Python that import: these rewritten, and said, for what they bind."""
    starts = [0]
    for line in text.encode().split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    spans = [
        (starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]

    def imported(match: re.Match[str]) -> str:
        at = len(text[: match.start()].encode())
        if not any(start <= at < end for start, end in spans):
            return match[0]
        names = [name.strip().partition(" as ") for name in match[2].split(",")]
        lines, renamed = statement(match[1][1:], [(name, alias or None) for name, _, alias in names])
        if renamed:
            print(f"{where}: in a string: {match[0]} -> {lines} {renamed}")
        return "; ".join(lines)

    return IMPORT.sub(imported, text)


def main() -> None:
    places = destinations()
    if "--check" in sys.argv:
        print("\n".join(f"{old.relative_to(ROOT)} -> {new.relative_to(ROOT)}" for old, new in places.items()))
        return
    skipped = (ROOT / "findings", HERE, ROOT / "benchmarks" / "results")
    for path in tracked():
        if path.suffix not in TEXTS or any(path.is_relative_to(folder) for folder in skipped):
            continue
        try:
            before = path.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        where = path.relative_to(ROOT).as_posix()
        if PACKAGE not in before and ".py" not in before:
            continue
        after = rewritten(embedded(before, where), where) if path.suffix == ".py" else before
        after = mentions(after, where)
        if after != before:
            path.write_bytes(after.encode())
    contents = {new: old.read_bytes() for old, new in places.items()}
    for old in places:
        old.unlink()
    for new, content in contents.items():
        new.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(content)
        for folder in new.parents:
            if folder in (ROOT / PACKAGE, ROOT / "tests", ROOT):
                break
            if not (folder / "__init__.py").exists():
                (folder / "__init__.py").touch()
    for folder in sorted((ROOT / PACKAGE).rglob("*/"), reverse=True):
        if folder.is_dir() and {item.name for item in folder.iterdir()} <= {"__pycache__"}:
            for item in folder.glob("__pycache__/*"):
                item.unlink()
            for item in folder.glob("__pycache__"):
                item.rmdir()
            folder.rmdir()
    ruff = [sys.executable, "-m", "ruff"]
    subprocess.run([*ruff, "check", "--quiet", "--fix", "--select", "I", "."], cwd=ROOT, check=False)
    subprocess.run([*ruff, "format", "--quiet", "."], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
