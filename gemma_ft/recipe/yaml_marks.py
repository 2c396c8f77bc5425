"""YAML text to plain values, with the line of every key: what a message needs to say where a fault is.

The scalars are YAML 1.2's core schema (`no`, `on`, `off` are text, `2e-4` is a number), which PyYAML's are not. The
SafeLoader is used up to its node graph only; nodes become str, int, float, bool, None, list and dict here, so that no
tag can construct anything. Size (load.py), depth, aliases and the number of values are capped.
Source: YAML 1.2.2, section 10.3 (core schema).
"""

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

import yaml

from gemma_ft.recipe.problems import Fault, KeyPath, Mark, dotted, shown

MAX_DEPTH = 20
MAX_ALIASES = 100
MAX_VALUES = 2_000  # counted after aliases are followed, which stops "billion laughs"
MAX_DIGITS = 400

PREFIX = "tag:yaml.org,2002:"
SCALARS = [
    (f"{PREFIX}null", re.compile(r"^(?:~|null|Null|NULL|)\Z")),
    (f"{PREFIX}bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)\Z")),
    (f"{PREFIX}int", re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z")),
    (f"{PREFIX}float", re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")),
    (f"{PREFIX}float", re.compile(r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z")),
]


@dataclass
class Document:
    """Plain values, the mark of each path in them, and the faults that reading found."""

    value: Any = None
    marks: dict[KeyPath, Mark] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


def read_yaml(text: str, label: str, *, lines: bool = True) -> Document:
    """A document's values and marks out of YAML text; what is wrong goes to `faults`, and nothing is raised.

    `label` names the text in messages; `lines` is false for text that has no lines to point at (an override).
    """
    document = Document()
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is not None:
            builder = _Builder(document, label, lines)
            document.value = builder.value(node, ())
        return document
    except _TooMuch as error:
        line, found = error.args
    except yaml.MarkedYAMLError as error:
        place = error.problem_mark or error.context_mark
        problem = error.problem or ""
        whole = f"{error.context} {problem}" if problem.startswith(("but ", "second ")) or not problem else problem
        line, found = place.line + 1 if place else 1, f"not valid YAML: {whole}"
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        found = f"not valid YAML: character U+{error.character:04X} is not allowed"
    except (ValueError, OverflowError):  # PyYAML lets chr() and int() speak for an escape or a version out of range
        line, found = 1, "not valid YAML: an escape or a number is out of range"
    return Document(faults=[Fault(Mark(label, line if lines else None), "", " ".join(found.split()))])


class _TooMuch(Exception):
    """A cap was passed; `args` are the line and the message."""


class _Loader(yaml.SafeLoader):
    """PyYAML's SafeLoader with YAML 1.2 scalars and caps, used for `compose` only."""

    yaml_implicit_resolvers: ClassVar[Any] = {None: SCALARS}  # type: ignore[misc]  # None: any first character
    depth = 0
    aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        line = self.peek_event().start_mark.line + 1
        self.aliases += self.check_event(yaml.AliasEvent)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _TooMuch(line, f"nested deeper than {MAX_DEPTH} levels; a recipe needs three")
        if self.aliases > MAX_ALIASES:
            raise _TooMuch(line, f"more than {MAX_ALIASES} aliases; write the values out")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class Dumper(yaml.SafeDumper):
    """PyYAML's SafeDumper that quotes exactly the texts which the reader above would take for something else."""

    yaml_implicit_resolvers: ClassVar[Any] = {None: SCALARS}  # type: ignore[misc]

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _Builder:
    """Nodes to plain values; fills the document's marks and faults. Raises _TooMuch."""

    def __init__(self, document: Document, label: str, lines: bool) -> None:
        self.document, self.label, self.lines = document, label, lines
        self.count = 0

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        self.count += 1
        if self.count > MAX_VALUES or len(path) > MAX_DEPTH:
            line = node.start_mark.line + 1
            raise _TooMuch(line, f"more than {MAX_VALUES} values, or an alias that holds itself")
        self.document.marks.setdefault(path, self._mark(node))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            self._check_tag(node, path, "seq")
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._scalar(node, path)

    def _mapping(self, node: yaml.Node, path: KeyPath) -> dict[str, Any]:
        self._check_tag(node, path, "map")
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if key_node.tag == f"{PREFIX}str" else None
            mark = self._mark(key_node)
            if not isinstance(key, str):
                found = shown([]) if not isinstance(key_node, yaml.ScalarNode) else key_node.value or "nothing"
                self._fault(mark, path, f"a key must be a word, got {found}")
            elif key in values:
                first = self.document.marks[(*path, key)].line
                self._fault(mark, (*path, key), f"set twice, first on line {first}; keep one" if first else "set twice")
            else:
                self.document.marks[(*path, key)] = mark
                values[key] = self.value(value_node, (*path, key))
        return values

    def _scalar(self, node: yaml.Node, path: KeyPath) -> str | int | float | bool | None:
        kind, text = node.tag.removeprefix(PREFIX), node.value
        if kind == "str":
            return str(text)
        # a tag can be written out (`!!int abc`), so the text is held against the tag's own pattern
        if not any(tag == node.tag and pattern.match(text) for tag, pattern in SCALARS):
            self._fault(self._mark(node), path, f"tag {node.tag!r} is not allowed")
            return None
        if len(text) > MAX_DIGITS:
            self._fault(self._mark(node), path, f"a number of more than {MAX_DIGITS} digits")
            return None
        if kind == "null":
            return None
        if kind == "bool":
            return str(text).lower() == "true"
        if kind == "int":
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))

    def _check_tag(self, node: yaml.Node, path: KeyPath, kind: str) -> None:
        if node.tag != PREFIX + kind:
            self._fault(self._mark(node), path, f"tag {node.tag!r} is not allowed")

    def _mark(self, node: yaml.Node) -> Mark:
        return Mark(self.label, node.start_mark.line + 1 if self.lines else None)

    def _fault(self, mark: Mark, path: KeyPath, text: str) -> None:
        self.document.faults.append(Fault(mark, dotted(path), text))
