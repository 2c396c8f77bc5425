"""The rules of the house that a machine can check: who imports whom, how long a file is, what may not be called."""

import ast
import fnmatch
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gemma_ft

PACKAGE = Path(gemma_ft.__file__).resolve().parent
FLOORS = [
    ["errors"],
    ["families"],
    ["system"],
    ["recipe", "data", "kernels"],
    ["model", "adapters", "plan"],
    ["build"],
    ["infer", "export", "verify"],
    ["serve", "evaluate"],
    ["train"],
    ["ui"],
    ["cli"],
    ["__main__"],
]
STRANGERS = ("data", "model", "adapters")  # to each other, and to recipes
HIGHEST = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
LIGHT = {"typer", *sys.stdlib_module_names}
LIGHT_OWN = ("system.paths", "export.form_names")  # of ours, what the command line may import at once
PICKLING = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "_shipped" not in path.parts)


# What may be imported inside a function outside of cli, and why. Packages:
LATE = {
    "accelerate": "seconds, for a run that is launched on several devices",
    "bitsandbytes": "seconds, for weights in 4 or 8 bits",
    "datasets": "seconds, for rows of the hub",
    "fsspec": "for rows behind a URL",
    "google": "the error of a damaged tokenizer.model",
    "grp": "not on every system",
    "huggingface_hub": "a second, for what lies on the hub",
    "lm_eval": "an extra",
    "matplotlib": "a second, for a page",
    "peft": "seconds, for an adapter",
    "pwd": "not on every system",
    "pyarrow": "for rows in tables",
    "rouge_score": "a second, for one metric",
    "sacrebleu": "a second, for two metrics",
    "sentencepiece": "for a tokenizer.model that lies alone",
    "tensorboardX": "for one tracker",
    "torch": "seconds, for those who ask only the environment; flex attention is compiled where it runs",
    "transformers": "seconds, for its tokenizer and its configs",
    "wandb": "seconds, for one tracker",
    "yaml": "for the card of a folder of rows",
}
# Modules of ours that are subclasses of such a package's classes, and nothing else: they are imported as it is.
LATE_OWN = {
    (
        "gemma_ft/adapters/fused_layers.py",
        "gemma_ft.adapters.fused_lora_4bit",
    ),  # PEFT's layer for 4 bits
    ("gemma_ft/adapters/lora.py", "gemma_ft.adapters.fused_layers"),  # PEFT
    ("gemma_ft/adapters/quantize.py", "gemma_ft.adapters.nf4_linear"),  # bitsandbytes
    ("gemma_ft/build/pretrained.py", "gemma_ft.adapters.fused_layers"),  # PEFT
    ("gemma_ft/build/pretrained.py", "gemma_ft.adapters.nf4_linear"),  # bitsandbytes
    ("gemma_ft/evaluate/harness.py", "gemma_ft.evaluate.harness_model"),  # lm-eval
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every module that is imported anywhere in a tree, functions and TYPE_CHECKING blocks included, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield node.module, node.lineno
            if node.module == "gemma_ft":
                yield from ((f"gemma_ft.{name.name}", node.lineno) for name in node.names)


def rooms_imported(path: Path) -> Iterator[tuple[str, int]]:
    for module, line in imported(tree_of(path)):
        top, _, rest = module.partition(".")
        if top == "gemma_ft" and rest and not rest.startswith("_"):
            yield rest.split(".")[0], line


def name(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


def faults_of(path: Path) -> list[str]:
    """What a file imports that its floor does not allow."""
    mine, found = room_of(path), []
    for room, line in rooms_imported(path):
        where = f"{name(path)}:{line}: {mine} imports {room}"
        if room not in HIGHEST:
            found.append(f"{where}, which has no floor")
        elif mine in STRANGERS and room == "recipe":
            found.append(f"{where}: build turns recipes into plain arguments")
        elif room != mine and HIGHEST[room] >= HIGHEST[mine]:
            found.append(f"{where}, which is not below it")
    return found


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_go_down_only(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        pytest.skip("the public names are handed out lazily from any floor")
    assert room_of(path) in HIGHEST, f"{name(path)}: give the room a floor in FLOORS"
    assert faults_of(path) == []


def test_a_broken_rule_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The walker itself: imports in functions, strangers, a room above, a recipe in a stranger's room."""
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / "gemma_ft")
    bad = tmp_path / "gemma_ft" / "data" / "bad.py"
    bad.parent.mkdir(parents=True)
    bad.write_text(
        "from gemma_ft.build import model\nfrom gemma_ft.errors import UserError\nimport gemma_ft.model.gemma\n"
        "def f():\n    from gemma_ft.recipe.load import load_recipe\n"
    )
    assert faults_of(bad) == [
        "gemma_ft/data/bad.py:1: data imports build, which is not below it",
        "gemma_ft/data/bad.py:3: data imports model, which is not below it",
        "gemma_ft/data/bad.py:5: data imports recipe: build turns recipes into plain arguments",
    ]


def test_the_house_has_18_rooms_on_11_floors() -> None:
    rooms = {room_of(path) for path in FILES} - {"__init__", "__main__"}
    assert sorted(rooms) == sorted(set(HIGHEST) - {"__main__"})
    assert len(rooms) == 18
    assert len([floor for floor in FLOORS if floor != ["__main__"]]) == 11


def test_inside_data_the_order_is_read_encode_pack_check() -> None:
    order = ["conversation", "read", "encode", "pack", "check"]
    files = [path for path in FILES if room_of(path) == "data" and path.name != "__init__.py"]
    back = [
        f"{name(path)}:{line}: {module}"
        for path in files
        for module, line in imported(tree_of(path))
        if module.startswith("gemma_ft.data.")
        and order.index(module.split(".")[2]) > order.index(path.relative_to(PACKAGE / "data").with_suffix("").parts[0])
    ]
    assert back == []


def late_imports(path: Path) -> set[str]:
    """What is imported inside functions of a file."""
    functions = [n for n in ast.walk(tree_of(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {module for function in functions for module, _ in imported(function)}


def test_late_imports_are_those_with_a_reason() -> None:
    files = [path for path in FILES if room_of(path) != "cli" and path != PACKAGE / "__init__.py"]
    late = {(name(path), module) for path in files for module in late_imports(path)}
    own = {(file, module) for file, module in late if module.startswith("gemma_ft.")}
    assert own == LATE_OWN
    assert {module.split(".")[0] for file, module in late if not module.startswith("gemma_ft")} == set(LATE)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_file_is_longer_than_320_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 320


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_function_is_longer_than_a_page(path: Path) -> None:
    limit = 80 if room_of(path) == "train" else 50
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False) or ""  # a docstring may be as long as it has to say
            lines = node.end_lineno - node.lineno + 1 - (len(text.splitlines()) if text else 0)
            assert lines <= limit, f"{name(path)}:{node.lineno}: {node.name} has {lines} lines"


def test_init_files_are_empty_but_the_top_one() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        if path != PACKAGE / "__init__.py":
            assert path.read_bytes() == b"", name(path)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_the_environment_is_read_in_one_place(path: Path) -> None:
    if path == PACKAGE / "system/environment.py":
        pytest.skip("this is the place")
    for node in ast.walk(tree_of(path)):
        names = {node.attr} if isinstance(node, ast.Attribute) else set()
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            names = {alias.name for alias in node.names}
        touched = names & {"environ", "environb", "getenv", "putenv"}
        assert not touched, f"{name(path)}:{node.lineno}: os.{touched.pop()} is read in system/environment.py only"


def shown_in(tree: ast.AST) -> list[str]:
    """What a tree uses to reach a console: rich, print, the standard streams, tracebacks."""
    found = [
        f"{line}: imports {module}" for module, line in imported(tree) if module.split(".")[0] in ("rich", "typer")
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            found.append(f"{node.lineno}: prints")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "sys" and node.attr in ("stdout", "stderr", "__stdout__", "__stderr__"):
                found.append(f"{node.lineno}: uses sys.{node.attr}")
            if node.value.id == "traceback" and node.attr.startswith("print"):
                found.append(f"{node.lineno}: prints a traceback")
        if isinstance(node, ast.ImportFrom) and node.module == "sys":
            found += [f"{node.lineno}: uses sys.{one.name}" for one in node.names if one.name.startswith("std")]
    return found


@pytest.mark.parametrize("path", [path for path in FILES if path.parent != PACKAGE], ids=name)
def test_below_the_ui_nothing_is_shown(path: Path) -> None:
    """Rooms return what came of their work and tell an observer how it goes."""
    if HIGHEST[room_of(path)] < HIGHEST["ui"]:
        assert shown_in(tree_of(path)) == [], name(path)


def test_what_is_shown_is_seen() -> None:
    """The walker itself."""
    text = (
        "import sys, traceback\nfrom sys import stderr\n"
        "def f():\n    from rich.console import Console\n    print(1)\n    sys.stderr.write('2')\n"
        "    traceback.print_exc()\n    'print(3)'\n"
    )
    assert sorted(shown_in(ast.parse(text))) == [
        "2: uses sys.stderr", "4: imports rich.console", "5: prints", "6: uses sys.stderr", "7: prints a traceback"
    ]  # fmt: skip


def test_bars_are_set_up_in_one_place() -> None:
    users = [name(path) for path in FILES for module, _ in imported(tree_of(path)) if module == "rich.progress"]
    assert users == ["gemma_ft/ui/progress.py"]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_nothing_is_pickled(path: Path) -> None:
    tree = tree_of(path)
    for module, line in imported(tree):
        assert module.split(".")[0] not in PICKLING, f"{name(path)}:{line}: {module}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr not in ("save", "load"), f"{name(path)}:{node.lineno}: torch.{node.attr}"
        if isinstance(node, ast.arg):
            assert node.arg != "trust_remote_code", f"{name(path)}:{node.lineno}"
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":  # it may only be refused
            assert isinstance(node.value, ast.Constant), f"{name(path)}:{node.lineno}"
            assert node.value.value is False, f"{name(path)}:{node.lineno}"


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) == "cli"], ids=name)
def test_cli_modules_import_nothing_heavy_at_their_top(path: Path) -> None:
    for node in tree_of(path).body:
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        for module, line in imported(node):
            top, _, rest = module.partition(".")
            allowed = rest.split(".")[0] in ("", "cli", "errors", "__version__") if top == "gemma_ft" else top in LIGHT
            assert allowed or rest in LIGHT_OWN, f"{name(path)}:{line}: {module}"


def test_no_vague_room_names() -> None:
    for path in FILES:
        assert not set(path.stem.split("_")) & {"utils", "util", "helpers", "helper", "common", "manager"}, name(path)


def test_no_test_lies_where_nobody_looks(pytestconfig: pytest.Config) -> None:
    """pytest does not go into folders of some names."""
    passed_over = pytestconfig.getini("norecursedirs")
    tests = Path(__file__).resolve().parent
    folders = {path.parent.relative_to(tests) for path in tests.rglob("test_*.py")}
    assert [str(f) for f in folders for part in f.parts if any(fnmatch.fnmatch(part, one) for one in passed_over)] == []
