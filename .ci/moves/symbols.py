"""Rewrites who imports a function that moved to another module: `symbols.txt` holds module, name and new module.

    python .ci/moves/symbols.py

The functions themselves are moved by hand before. A module imported as a whole (`from gemma_ft.system import
environment`) is followed in its attributes; what is not used any more is taken out by ruff.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PACKAGE = "gemma_ft"
ROWS = [line.split() for line in (HERE / "symbols.txt").read_text().splitlines() if line and not line.startswith("#")]
HOMES = {(module, name): new for module, name, new in ROWS}


def imported(module: str, alias: ast.alias) -> tuple[str, str]:
    """(home, statement) of one imported name."""
    home = HOMES.get((module, alias.name), module)
    name = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
    return home, name


def rewritten(text: str) -> str:
    tree = ast.parse(text)
    lines = text.encode().split(b"\n")
    edits: dict[tuple[int, int], tuple[int, int, str]] = {}
    modules = {}  # local name -> module of ours
    first = None
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
            first = first if first is not None else node
            module = node.module.partition(".")[2]
            by_home: dict[str, list[str]] = {}
            for alias in node.names:
                modules[alias.asname or alias.name] = f"{module}.{alias.name}"
                home, name = imported(module, alias)
                by_home.setdefault(home, []).append(name)
            if set(by_home) != {module}:
                indent = "\n" + " " * node.col_offset
                new = [f"from {PACKAGE}.{home} import {', '.join(names)}" for home, names in by_home.items()]
                edits[node.lineno, node.col_offset] = (node.end_lineno, node.end_col_offset, indent.join(new))
    needed: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            home = HOMES.get((modules.get(node.value.id, ""), node.attr))
            if home:
                needed.add(home)
                last = home.rpartition(".")[2]
                edits[node.value.lineno, node.value.col_offset] = (node.lineno, node.value.end_col_offset, last)
    if needed:
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and any(
                (f"{(node.module or '').partition('.')[2]}.{alias.name}", name) in HOMES
                for alias in node.names
                for _, name, _ in ROWS
            ):
                last_line, last_column, new = edits.get(
                    (node.lineno, node.col_offset),
                    (node.end_lineno, node.end_col_offset, ast.unparse(node)),
                )
                more = [f"from {PACKAGE}.{h.rpartition('.')[0]} import {h.rpartition('.')[2]}" for h in sorted(needed)]
                indent = "\n" + " " * node.col_offset
                edits[node.lineno, node.col_offset] = (last_line, last_column, indent.join([new, *more]))
    for (line, start), (last, end, new) in sorted(edits.items(), reverse=True):
        head, tail = lines[line - 1][:start], lines[last - 1][end:]
        lines[line - 1 : last] = (head + new.encode() + tail).split(b"\n")
    return b"\n".join(lines).decode()


def main() -> None:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        path = ROOT / name
        if name.startswith(".ci/") or not path.is_file():
            continue
        before = path.read_text(encoding="utf-8")
        after = rewritten(before) if PACKAGE in before else before
        for (module, symbol), home in HOMES.items():
            after = re.sub(rf"\b{PACKAGE}\.{re.escape(module)}\.{symbol}\b", f"{PACKAGE}.{home}.{symbol}", after)
        if after != before:
            path.write_text(after, encoding="utf-8")
    ruff = [sys.executable, "-m", "ruff"]
    subprocess.run([*ruff, "check", "--quiet", "--fix", "--select", "I,F401", "."], cwd=ROOT, check=False)
    subprocess.run([*ruff, "format", "--quiet", "."], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
