"""Gives functions, classes and files the names that `names.txt` says, as whole words, wherever they are used.

    python .ci/moves/names.py           rename
    python .ci/moves/names.py --check   what it would do, and what is in its way

A line of names.txt: the old and the new name, then where: globs of files below the root (none: everywhere), and what
more is renamed than names in Python, C++ and the backticks of comments, docstrings and pages:

    +strings   strings that are the whole name (names of C functions, rows of a table)
    +keywords  keyword arguments and the parameters they go to, which are left alone without
    +calls:F   keyword arguments of calls of F, and nothing else
    +prose     whole words in comments and docstrings as well

Strings that are handed to setattr, getattr and the like, dotted paths of ours that end with the name, and strings of
lines of Python that import from us, always follow.
A name with a dot in it is a file: it is moved, and mentions of it follow. Running it twice changes nothing more.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FOLDERS = ("gemma_ft/", "tests/", "benchmarks/", "docs/")
PAGES = (".md",)
CPP = (".h", ".cpp")
BY_NAME = ("setattr", "getattr", "hasattr", "delattr", "attrgetter", "patch", "object")


@dataclass(frozen=True)
class Rename:
    old: str
    new: str
    globs: tuple[str, ...]
    flags: frozenset[str]

    @property
    def function(self) -> str | None:
        """The function whose keyword is renamed, where it is that alone."""
        return next((flag.partition(":")[2] for flag in self.flags if flag.startswith("calls:")), None)

    def meets(self, name: str) -> bool:
        return not self.globs or any(fnmatch(name, one) for one in self.globs)

    @property
    def word(self) -> re.Pattern[str]:
        return re.compile(rf"(?<![\w]){re.escape(self.old)}(?![\w])")


@dataclass
class Edits:
    """Places of a text, and what goes there; and what a reader of --check should see."""

    places: dict[tuple[int, int], str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def put(self, start: int, end: int, text: str) -> None:
        self.places[start, end] = text

    def applied(self, text: str) -> str:
        for (start, end), new in sorted(self.places.items(), reverse=True):
            text = text[:start] + new + text[end:]
        return text


def renames() -> list[Rename]:
    rows = [line.split("#")[0].split() for line in (HERE / "names.txt").read_text(encoding="utf-8").splitlines()]
    return [
        Rename(
            row[0],
            row[1],
            tuple(part for part in row[2:] if part[0] != "+"),
            frozenset(part[1:] for part in row[2:] if part[0] == "+"),
        )
        for row in rows
        if row
    ]


def files() -> Iterator[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        path = ROOT / name
        ours = name.startswith(FOLDERS) or name in ("README.md", "CONTRIBUTING.md")
        if ours and path.is_file() and path.suffix in (".py", *PAGES, *CPP) and path != ROOT / "docs" / "words.md":
            yield path


def offsets(text: str) -> list[int]:
    """The place in a text at which each line begins, lines counted from 1."""
    found = [0, 0]
    for line in text.splitlines(keepends=True):
        found.append(found[-1] + len(line))
    return found


def tokens(text: str) -> Iterator[tuple[str, str, int]]:
    """(kind, text, place) of names, strings, comments and what else stands in a Python file."""
    import io
    import tokenize

    lines = offsets(text)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        yield tokenize.tok_name[token.type], token.string, lines[token.start[0]] + token.start[1]


def docstrings(text: str) -> set[int]:
    """Places of the strings of a Python file that stand for themselves."""
    lines, found = offsets(text), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            line = text[lines[node.lineno] :].splitlines()[0].encode()
            found.add(lines[node.lineno] + len(line[: node.col_offset].decode()))
    return found


def called_by_name(text: str) -> set[int]:
    """Places of the strings that are handed to setattr and the like."""
    lines, found = offsets(text), set()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for argument in node.args if name in BY_NAME else ():
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                line = text[lines[argument.lineno] :].splitlines()[0].encode()
                found.add(lines[argument.lineno] + len(line[: argument.col_offset].decode()))
    return found


def keywords(text: str, rows: list[Rename], edits: Edits) -> None:
    """Keyword arguments of calls of the functions that the rows name."""
    lines = offsets(text)
    for node in ast.walk(ast.parse(text)) if rows else ():
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for argument in node.keywords:
            for row in rows:
                if name == row.function and argument.arg == row.old:
                    line = text[lines[argument.lineno] :].splitlines()[0].encode()
                    start = lines[argument.lineno] + len(line[: argument.col_offset].decode())
                    edits.put(start, start + len(row.old), row.new)


def bound(text: str) -> set[str]:
    """Names that a Python file gives a meaning to, or reads: not attributes, nor parts of a module's name."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).split(".")[0])
    return found


def in_python(text: str, rows: list[Rename]) -> Edits:
    edits, found = Edits(), list(tokens(text))
    own, named = docstrings(text), called_by_name(text)
    keywords(text, [row for row in rows if row.function], edits)
    rows = [row for row in rows if not row.function]
    by_old = {row.old: row for row in rows}
    depth = 0
    for index, (kind, token, start) in enumerate(found):
        depth += (token in ("(", "[", "{")) - (token in (")", "]", "}")) if kind == "OP" else 0
        if kind == "NAME" and token in by_old:
            row = by_old[token]
            before, after = found[index - 1][1] if index else "", found[index + 1][1]
            keyword = after == "=" and depth > 0 and before in ("(", ",", "\n", "*")
            if not keyword or "keywords" in row.flags:
                edits.put(start, start + len(token), row.new)
        elif kind == "COMMENT" or (kind == "STRING" and start in own):
            quoted(text, start, start + len(token), rows, edits)
        elif kind in ("STRING", "FSTRING_MIDDLE"):
            in_string(token, start, rows, named, edits)
    for row in rows:
        touched = any(text[start:end] == row.old for start, end in edits.places)
        if touched and row.new in bound(text):
            edits.notes.append(f"{row.new} is a name of this file already (for {row.old})")
    return edits


def in_string(token: str, start: int, rows: list[Rename], named: set[int], edits: Edits) -> None:
    """A string that is a name, a dotted path of ours, or an f-string with names in its braces."""
    prefix = re.match(r"[A-Za-z]*", token)[0]  # type: ignore[index]
    quote = 3 if token[len(prefix) :][:3] in ('"""', "'''") else 1
    inner, first = token[len(prefix) + quote : len(token) - quote], start + len(prefix) + quote
    code = "\n" in inner and re.search(r"(?:from|import) gemma_ft", inner)
    for row in rows:
        if code:
            for word in row.word.finditer(inner):
                edits.put(first + word.start(), first + word.end(), row.new)
            continue
        dotted = re.fullmatch(r"gemma_ft(?:\.\w+)+", inner) and inner.endswith(f".{row.old}")
        if inner == row.old or dotted:
            if dotted or start in named or "strings" in row.flags:
                edits.put(first + len(inner) - len(row.old), first + len(inner), row.new)
            else:
                edits.notes.append(f"the string {token} stays")
        elif "f" in prefix.lower():
            for braces in re.finditer(r"(?<!\{)\{([^{}]*)\}", inner):
                for word in row.word.finditer(re.split(r"(?<![!=<>]):(?!=)", braces[1])[0]):
                    at = first + braces.start(1) + word.start()
                    edits.put(at, at + len(row.old), row.new)
        if row.word.search(inner) and inner != row.old and "f" not in prefix.lower() and not dotted:
            edits.notes.append(f"the string {token[:70]} stays")


def quoted(text: str, start: int, end: int, rows: list[Rename], edits: Edits) -> None:
    """Names in the backticks of a comment, a docstring or a page; in its prose, where a row says so."""
    for row in rows:
        for word in row.word.finditer(text, start, end) if "prose" in row.flags else ():
            edits.put(*word.span(), row.new)
    for span in re.finditer(r"`[^`\n]+`", text[start:end]):
        for row in rows:
            for word in row.word.finditer(span[0]):
                at = start + span.start() + word.start()
                edits.put(at, at + len(row.old), row.new)


def in_cpp(text: str, rows: list[Rename]) -> Edits:
    edits = Edits()
    strings = [match.span() for match in re.finditer(r'"[^"\n]*"', text)]
    for row in rows:
        for word in row.word.finditer(text):
            if not any(start <= word.start() < end for start, end in strings):
                edits.put(*word.span(), row.new)
        bare = re.sub(r'"[^"\n]*"|//.*', "", text)
        if row.word.search(bare) and re.search(rf"\b{re.escape(row.new)}\b", bare):
            edits.notes.append(f"{row.new} is a name of this file already (for {row.old})")
    return edits


def in_page(text: str, rows: list[Rename]) -> Edits:
    edits = Edits()
    quoted(text, 0, len(text), rows, edits)
    for block in re.finditer(r"^```.*?^```", text, re.M | re.S):
        for row in rows:
            for word in row.word.finditer(block[0]):
                edits.put(block.start() + word.start(), block.start() + word.end(), row.new)
    return edits


def move_files(rows: list[Rename], *, check: bool) -> None:
    """Files that are renamed, and every mention of them."""
    for path in list(files()):
        for row in rows:
            if path.name == row.old:
                print(f"{path.relative_to(ROOT)} -> {row.new}")
                if not check:
                    subprocess.run(["git", "mv", path, path.with_name(row.new)], cwd=ROOT, check=True)
    for path in files():
        text = path.read_text(encoding="utf-8")
        new = text
        for row in rows:
            new = row.word.sub(row.new, new) if row.meets(path.relative_to(ROOT).as_posix()) else new
        if new != text and not check:
            path.write_text(new, encoding="utf-8")


def main() -> None:
    check = "--check" in sys.argv
    every = renames()
    move_files([row for row in every if "." in row.old], check=check)
    counts = dict.fromkeys((row for row in every if "." not in row.old), 0)
    for path in files():
        name, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        rows = [row for row in counts if row.meets(name) and row.word.search(text)]
        if not rows:
            continue
        find = in_python if path.suffix == ".py" else in_cpp if path.suffix in CPP else in_page
        edits = find(text, rows)
        for row in rows:
            counts[row] += sum(text[start:end] == row.old for start, end in edits.places)
        if check:
            print("".join(f"{name}: {note}\n" for note in dict.fromkeys(edits.notes)), end="")
        elif edits.places:
            path.write_text(edits.applied(text), encoding="utf-8")
    for row, count in counts.items():
        if check or count:
            print(f"{row.old} -> {row.new}: {count} places{'' if count else ', NOTHING TO RENAME'}")
    if not check:
        ruff = [sys.executable, "-m", "ruff"]
        subprocess.run([*ruff, "check", "--quiet", "--fix", "--select", "I", "."], cwd=ROOT, check=False)
        subprocess.run([*ruff, "format", "--quiet", "."], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
