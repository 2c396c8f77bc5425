"""What is bent of TRL's trainer: in one file, few names, each of which is there to be overridden."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import gemma_ft
from gemma_ft.train import step
from gemma_ft.train.trainer import GemmaTrainer

PACKAGE = Path(gemma_ft.__file__).resolve().parent
# Each name, and the class of the pinned libraries whose method it takes the place of.
OVERRIDES = {
    "_send_telemetry": "_BaseTrainer",
    "get_train_dataloader": "Trainer",
    "training_step": "SFTTrainer",
    "create_scheduler": "Trainer",
    "_maybe_log_save_evaluate": "Trainer",
    "evaluate": "SFTTrainer",
    "_save_checkpoint": "SFTTrainer",
    "_load_from_checkpoint": "Trainer",
    "_load_optimizer_and_scheduler": "Trainer",
}


def owner(name: str) -> type | None:
    """The nearest base class that defines a name."""
    return next((base for base in GemmaTrainer.__mro__[1:-1] if name in vars(base)), None)


def test_each_override_is_listed_and_exists_in_the_library() -> None:
    ours = [name for name in vars(GemmaTrainer) if name not in ("__init__", "__module__", "__doc__")]
    found = {name: base.__name__ for name in ours if (base := owner(name)) is not None}
    assert found == OVERRIDES
    assert len(found) <= 14
    assert len([name for name in found if name.startswith("_")]) <= 5


def test_each_override_takes_what_the_library_gives() -> None:
    for name in OVERRIDES:
        theirs = inspect.signature(getattr(owner(name), name))
        mine = inspect.signature(getattr(GemmaTrainer, name))
        kinds = {one.kind for one in mine.parameters.values()}
        for parameter in theirs.parameters.values():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            assert parameter.name in mine.parameters or inspect.Parameter.VAR_KEYWORD in kinds, (name, parameter)


def test_nothing_but_the_trainer_bends_a_trainer() -> None:
    """No other file has a subclass of TRL's trainer, imports one, or names what is private to it."""
    bending = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            attribute = node.attr if isinstance(node, ast.Attribute) else ""
            if {"SFTTrainer", "Trainer"} & set(names) or attribute in ("_n_gpu", "_last_lr", "_created_lr_scheduler"):
                bending.add(path.relative_to(PACKAGE).as_posix())
    assert bending == {"train/trainer.py"}


def test_the_page_is_a_page_of_plain_functions() -> None:
    source = inspect.getsource(step)
    assert len(source.splitlines()) <= 150
    classes = [one for one in ast.parse(source).body if isinstance(one, ast.ClassDef)]
    assert all(isinstance(part, ast.AnnAssign | ast.Expr) for one in classes for part in one.body)
