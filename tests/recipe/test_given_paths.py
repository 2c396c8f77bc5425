"""`~` in a path means what it means in a shell, in every key, option and call; nothing else of a path changes."""

from __future__ import annotations

import os
import pwd
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from gemma_ft import load_model, load_tokenizer
from gemma_ft.build.place import place_of
from gemma_ft.cli.app import build_app, main
from gemma_ft.cli.merge import _with_weight
from gemma_ft.errors import UserError
from gemma_ft.recipe.load import dump_recipe, load_recipe, parse_recipe
from gemma_ft.system import environment
from gemma_ft.system.launch import find_config
from gemma_ft.system.paths import expanded, given_path
from gemma_ft.system.shipped import locate, shipped_root
from tests.recipe.conftest import GOOD, Write, refusal

ME = pwd.getpwuid(os.getuid())


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, and another folder to stand in."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_what_becomes_of_a_path(home: Path) -> None:
    """The right values are bash 5's: `echo ~ ~/x ~user/x ./~/x a~/x` (bash(1), Tilde Expansion)."""
    assert expanded("~") == str(home)
    assert expanded("~/runs/x") == f"{home}/runs/x"
    assert expanded(Path("~/runs/*.jsonl")) == f"{home}/runs/*.jsonl"
    assert expanded(f"~{ME.pw_name}/x") == f"{ME.pw_dir.rstrip('/')}/x"
    for kept in ("x", "./x", "a~/x", "a/~/x", "/~/x", "s3://b/~/x", "owner/name", "", "~nobody-at-all.jsonl"):
        assert expanded(kept) == kept


def test_a_folder_that_is_named_so_can_be_given(home: Path) -> None:
    """pathlib drops `./`: the path that is handed on must not be taken for the home folder by whoever reads it next."""
    literal = Path.cwd() / "~" / "x"
    literal.mkdir(parents=True)
    (home / "x").mkdir()
    for text in ("./~/x", ".//~/x", str(literal)):
        assert given_path(text) == given_path(given_path(text)) == locate(text) == literal
        assert os.path.expanduser(str(given_path(text))) == str(literal)
    assert locate("~/x") == home / "x"
    assert locate("~/x.yaml") is None
    (Path.cwd() / "~draft").mkdir()
    assert locate("~draft/../~draft") == Path("~draft/../~draft")  # no user, but a folder that is there


@pytest.mark.parametrize("name", ["nobody-at-all", "no\0body"])
def test_a_user_that_is_not_there_is_refused(home: Path, name: str) -> None:
    with pytest.raises(UserError) as raised:
        expanded(f"~{name}/x")
    assert str(raised.value) == f"~{name}/x: there is no user {name!r} here; ./~{name}/x names a folder of that name"


SETTINGS = {
    "output_dir": "~/runs/x",
    "data": {"train": ["~/a.jsonl", {"path": "~/b/*.jsonl", "max_rows": 3}, "owner/name"], "eval": "~/c.jsonl"},
    "model": {"preset": "gemma-tiny", "weights": "~/m", "tokenizer": "~/t"},
    "eval": {"canary": "~/d.jsonl"},
    "strategy": "full",
}


def test_every_key_that_is_a_path_is_read_so(home: Path) -> None:
    recipe = parse_recipe(SETTINGS)
    assert recipe.output_dir == f"{home}/runs/x"
    assert [source.path for source in recipe.data.train] == [f"{home}/a.jsonl", f"{home}/b/*.jsonl", "owner/name"]
    assert recipe.data.eval is not None
    assert recipe.data.eval[0].path == f"{home}/c.jsonl"
    assert (recipe.model.weights, recipe.model.tokenizer) == (f"{home}/m", f"{home}/t")
    assert recipe.eval.canary == f"{home}/d.jsonl"
    (home / "again.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe("~/again").recipe == recipe  # and nothing is read a second time


def test_a_recipe_its_parent_and_what_is_set_over_it(home: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home.parent / "here")
    (home / "top.yaml").write_text(GOOD, encoding="utf-8")
    (home / "my.yaml").write_text("extends: ~/top\nseed: 7\n", encoding="utf-8")
    loaded = load_recipe("~/my.yaml", ["data.train=~/r.jsonl", "data.eval={path: ~/e.jsonl}", "output_dir=./~/x"])
    recipe = loaded.recipe
    assert (loaded.path, recipe.seed) == (home / "my.yaml", 7)
    assert recipe.data.train[0].path == f"{home}/r.jsonl"
    assert recipe.output_dir == str(Path.cwd() / "~" / "x")
    write("output_dir: ~nobody-at-all/x\n" + GOOD.partition("\n")[2])
    assert refusal("my.yaml") == [
        "my.yaml:1: output_dir: ~nobody-at-all/x: there is no user 'nobody-at-all' here; ./~nobody-at-all/x names a "
        "folder of that name"
    ]


def _callbacks(app: typer.Typer) -> Iterator[Callable[..., Any]]:
    yield from (command.callback for command in app.registered_commands if command.callback is not None)
    for group in app.registered_groups:
        assert group.typer_instance is not None
        yield from _callbacks(group.typer_instance)


def test_every_option_that_is_a_path_is_read_so(home: Path) -> None:
    """Those that take text (MODEL, RECIPE, --input) come to `locate`, which the next tests see."""
    parsers = {
        f"{callback.__module__} {name}": hint.__metadata__[0].parser
        for callback in _callbacks(build_app())
        for name, hint in typing.get_type_hints(callback, include_extras=True).items()
        if "Path" in str(hint) and name != "return"
    }
    assert len(parsers) >= 14
    assert {name for name, parser in parsers.items() if parser is not given_path} == set()
    assert given_path("~/x") == home / "x"
    assert _with_weight("~/a:0.5") == (home / "a", 0.5)
    assert _with_weight("~/a") == (home / "a", 1.0)


def test_models_configs_and_caches_are_found_there(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "tiny").symlink_to(shipped_root() / "data" / "gemma-tiny")
    assert len(load_tokenizer("~/tiny")) == len(load_tokenizer(Path("~/tiny"))) == 2048
    assert load_model("~/tiny").config.vocab_size == 2048
    assert place_of("~/tiny").folder == (shipped_root() / "data" / "gemma-tiny").resolve()
    (home / "mine.yaml").write_text("num_processes: 2\n", encoding="utf-8")
    assert find_config("~/mine.yaml") == home / "mine.yaml"
    monkeypatch.setenv("GEMMA_FT_CACHE", "~/cache")
    assert environment.cache_folder() == home / "cache"


def test_a_command_reads_what_a_shell_left_as_it_is(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "cp", "sft_tiny", "~"]) == 0
    assert (home / "sft_tiny.yaml").is_file()
    assert not Path("~").exists()
    assert main(["checkpoints", "~/no-run"]) == 2
    assert str(home / "no-run") in capsys.readouterr().err
