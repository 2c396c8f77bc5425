"""A recipe file and the overrides of a command line to one checked `Recipe`; and a recipe back to YAML.

Order of precedence: the parent that `extends` names, the file, then each override from left to right. Blocks are merged
key by key, everything else is replaced. All faults of all of them are told at once.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gemma_ft.errors import RecipeError
from gemma_ft.recipe.objectives import Preference, train_defaults
from gemma_ft.recipe.problems import COMMAND_LINE, Fault, KeyPath, Mark, did_you_mean, dotted, refuse, shown
from gemma_ft.recipe.schema import Quantize, Recipe, Source
from gemma_ft.recipe.validate import annotation_at, takes_text, unknown_key, validate
from gemma_ft.recipe.yaml_marks import Document, Dumper, read_yaml
from gemma_ft.system.paths import expanded
from gemma_ft.system.shipped import locate_recipe, shipped_recipes

MAX_BYTES = 256 * 1024
SOURCES = (("data", "train"), ("data", "eval"))  # what may be a path alone, to which an override adds keys
OBJECTIVE: KeyPath = ("objective",)
SHORTHANDS = ("quantize", "objective")  # blocks that may be their kind alone


@dataclass(frozen=True)
class LoadedRecipe:
    """A checked recipe, what to tell the user about it (a line each), and the file it came from."""

    recipe: Recipe
    notes: tuple[str, ...]
    path: Path


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> LoadedRecipe:
    """The recipe in a file (or a shipped one, by name) with `key.sub=value` and `~key` applied to it.

    Raises: RecipeError with a line for each fault.
    """
    file = locate_recipe(path)
    if file is None:
        raise RecipeError(f"{os.fspath(path)}: {_no_such_recipe(os.fspath(path))}")
    document = _read_with_parents(file)
    for text in overrides:
        _override(document, text)
    told = _take_defaults(document)
    recipe, notes = _settle(validate(document))
    return LoadedRecipe(recipe, (*told, *notes), file)


def parse_recipe(mapping: Mapping[str, Any]) -> Recipe:
    """A recipe out of plain values, as a file with the same content would give it (without `extends`).

    Raises: RecipeError.
    """
    document = Document(value=dict(mapping))
    _expand_shorthand(document)
    _take_defaults(document)
    return _settle(validate(document))[0]


def dump_recipe(recipe: Recipe) -> str:
    """YAML text with every setting of a recipe, which `load_recipe` reads back to an equal one."""
    return yaml.dump(recipe.model_dump(), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def _take_defaults(document: Document) -> tuple[str, ...]:
    """What the kind of objective takes by default where the recipe does not say it, put into the document; told."""
    values = document.value
    block, train = values.get("objective"), values.get("train", {})
    kind = block.get("kind") if isinstance(block, dict) else None
    if not isinstance(kind, str) or not isinstance(train, dict):
        return ()
    taken = {key: value for key, value in train_defaults(kind, values.get("strategy")).items() if key not in train}
    if taken:
        values["train"] = {**train, **taken}
    told = ", ".join(f"{key} {value:g}" for key, value in taken.items())
    return (f"objective {kind}: {told} (train has no other)",) if taken else ()


def _settle(recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with the blocks its strategy uses and no others, and a note for each one ignored."""
    notes, changes = [], dict[str, Any]()
    if recipe.strategy == "full" and recipe.adapter is not None:
        changes["adapter"] = None
        notes.append(
            "adapter: ignored, strategy full trains all weights"
            if recipe.adapter.start is None
            else f"adapter.start: ignored, strategy full trains all weights of the base as it is; to go on from "
            f"{recipe.adapter.start}, merge it (gemma-ft merge) and set model.weights to the result"
        )
    if recipe.strategy != "qlora" and recipe.quantize is not None:
        changes["quantize"] = None
        notes.append(f"quantize: ignored, strategy {recipe.strategy} does not quantize")
    if recipe.strategy == "qlora" and recipe.quantize is None:
        changes["quantize"] = Quantize()
    if recipe.data.eval is not None and recipe.data.eval_fraction > 0:
        changes["data"] = recipe.data.model_copy(update={"eval_fraction": 0.0})
        notes.append("data.eval_fraction: ignored, data.eval names the held-out rows")
    if recipe.objective.kind == "reward":  # a model that scores is not asked for answers
        unasked = {"canary": None, "generate_rows": 0, "samples": 0}
        changes["eval"] = recipe.eval.model_copy(update=unasked)
    adapter = changes.get("adapter", recipe.adapter)
    if isinstance(recipe.objective, Preference) and not recipe.objective.dropout and adapter and adapter.dropout:
        changes["adapter"] = adapter.model_copy(update={"dropout": 0.0})
        notes.append(
            f"adapter.dropout: off, as objective {recipe.objective.kind} asks; objective.dropout: true keeps it"
        )
    return recipe.model_copy(update=changes), tuple(notes)


def _read_with_parents(file: Path) -> Document:
    """A file's values over those of its parent, and so on up. Raises: RecipeError."""
    chain: list[Document] = []
    seen: list[Path] = []
    while file is not None:
        seen.append(file.resolve())
        document = _read_file(file)
        chain.append(document)
        if "extends" not in document.value:
            break
        parent = document.value.pop("extends")
        mark = document.marks[("extends",)]
        found = locate_recipe(parent, beside=file.parent) if isinstance(parent, str) and parent else None
        if not isinstance(parent, str):
            refuse([*document.faults, Fault(mark, "extends", f"expected one recipe, got {shown(parent)}")])
        elif found is None:
            refuse([*document.faults, Fault(mark, "extends", f"'{parent}': {_no_such_recipe(parent)}")])
        elif found.resolve() in seen:
            refuse([*document.faults, Fault(mark, "extends", f"'{parent}' leads back to itself")])
        assert found is not None
        file = found
    merged = chain.pop()
    while chain:
        _merge(merged, chain.pop())
    return merged


def _read_file(file: Path) -> Document:
    """A recipe file's values, a mapping for certain. Raises: RecipeError when it cannot be read as one."""
    label = _label(file)
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{label}:{line}: not UTF-8 text; is this a recipe?") from None
    except OSError as error:
        raise RecipeError(f"{label}: cannot be read: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{label}: larger than {MAX_BYTES // 1024} KiB; is this a recipe?")
    document = read_yaml(text, label)
    if document.value is None:
        refuse(document.faults)
        document.value = {}
    if not isinstance(document.value, dict):
        refuse([Fault(document.marks[()], "", f"expected key: value lines, got {shown(document.value)}")])
    document.marks.setdefault((), Mark(label, 1))
    _expand_shorthand(document)
    return document


def _override(document: Document, text: str) -> None:
    """`key.sub=value` set in, or `~key` removed from, a document; what is wrong joins its faults."""
    mark = Mark(COMMAND_LINE)
    name, equals, value = text.partition("=")
    removes = name.startswith("~")
    path: KeyPath = tuple(name.removeprefix("~").split("."))
    if bool(equals) == removes or not all(path):
        document.faults.append(Fault(mark, "", f"expected key=value or ~key, got {shown(text)}"))
    elif path == ("extends",):
        document.faults.append(Fault(mark, "extends", "only a recipe file can name its parent"))
    elif unknown := next((path[:end] for end in range(1, len(path) + 1) if annotation_at(path[:end]) is None), None):
        document.faults.append(Fault(mark, dotted(unknown), unknown_key(unknown)))
    elif removes:
        _remove(document, path)
    else:
        given = _override_value(value, path)
        document.faults += [fault._replace(key=dotted(path)) for fault in given.faults]
        for key in reversed(path):
            given.value = {key: given.value}
        marks = {path + below: mark for below in given.marks} | {path[:end]: mark for end in range(len(path) + 1)}
        over = Document(given.value, marks)
        _expand_shorthand(over)
        _merge(document, over)


def _override_value(value: str, path: KeyPath) -> Document:
    """The value as YAML; where any text will do, what is no text in YAML (`{question}`, 2024) is taken as is."""
    given = read_yaml(value, COMMAND_LINE, lines=False)
    if path in SOURCES and (given.faults or isinstance(given.value, bool | int | float) or " #" in value):
        return Document(value=value) if value.isprintable() else given
    if takes_text(annotation_at(path)) and (given.faults or not isinstance(given.value, str | None)):
        return Document(value=value) if value.isprintable() else given
    return given


def _merge(document: Document, over: Document) -> None:
    """`over`'s values and marks laid over the document's: blocks key by key, the rest replaced."""

    def lay(values: dict[str, Any], others: dict[str, Any], path: KeyPath) -> None:
        for key, other in others.items():
            here = (*path, key)
            if here == OBJECTIVE:
                _forget_other_kind(document, other)
            if isinstance(other, dict) and isinstance(values.get(key), dict):
                lay(values[key], other, here)
                continue
            if isinstance(other, dict) and here in SOURCES and "path" not in other:
                if isinstance(values.get(key), list):
                    text = f"there are {len(values[key])} sources, so that this does not say which; give the whole list"
                    document.faults.append(Fault(over.marks.get(here, Mark(COMMAND_LINE)), dotted(here), text))
                    continue
                if isinstance(values.get(key), str):
                    other = {"path": values[key], **other}
            values[key] = other
            _forget_marks(document, here)
            document.marks.update({at: mark for at, mark in over.marks.items() if at[: len(here)] == here})

    lay(document.value, over.value, ())
    document.faults += over.faults
    # what is missing altogether is missing from the file that was started, not from its parent
    if over.marks.get((), Mark(COMMAND_LINE)).label != COMMAND_LINE:
        document.marks[()] = over.marks[()]


def _forget_other_kind(document: Document, over: Any) -> None:
    """Takes keys out of the objective of a file where another kind is laid over it: they are of its own kind. What the
    command line said stays.
    """
    block, kind = document.value.get("objective"), over.get("kind") if isinstance(over, dict) else None
    if not isinstance(block, dict) or kind in (None, block.get("kind")):
        return
    for key in list(block):
        if document.marks.get((*OBJECTIVE, key), Mark("")).label != COMMAND_LINE:
            _remove(document, (*OBJECTIVE, key))


def _remove(document: Document, path: KeyPath) -> None:
    """The key taken out; nothing happens when it is not set."""
    block = document.value
    for part in path[:-1]:
        block = block.get(part) if isinstance(block, dict) else None
    if isinstance(block, dict):
        block.pop(path[-1], None)
        _forget_marks(document, path)


def _forget_marks(document: Document, path: KeyPath) -> None:
    for at in [at for at in document.marks if at[: len(path)] == path]:
        del document.marks[at]


def _expand_shorthand(document: Document) -> None:
    """`quantize: int8` written out as `quantize: {kind: int8}`."""
    for block in SHORTHANDS:
        kind = document.value.get(block)
        if isinstance(kind, str):
            document.value[block] = {"kind": kind}
            if mark := document.marks.get((block,)):
                document.marks[(block, "kind")] = mark


def _no_such_recipe(text: str) -> str:
    """What to say about a recipe that is not there."""
    if os.path.isdir(expanded(text)):
        return "is a folder; name a recipe file in it"
    shipped = [path.stem for path in shipped_recipes()]
    near = did_you_mean(Path(text).name.removesuffix(".yaml"), shipped)
    return f"no such recipe{near or ';'} shipped: {', '.join(shipped)}"


def _label(file: Path) -> str:
    """How messages name a file: as given, or from the current directory when it lies below it."""
    here = Path.cwd()
    return str(file.relative_to(here)) if file.is_absolute() and file.is_relative_to(here) else str(file)


def names_of(sources: Sequence[Source]) -> str:
    """What sources of rows are called, in one line."""
    return ", ".join(source.path for source in sources)
