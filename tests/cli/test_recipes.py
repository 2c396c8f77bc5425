"""`gemma-ft recipes` and `gemma-ft schema`: what they print and write."""

import json
from pathlib import Path

import pytest

from gemma_ft.cli.app import main
from gemma_ft.recipe.json_schema import json_schema
from gemma_ft.recipe.load import load_recipe
from gemma_ft.system.shipped import shipped_recipes, shipped_root


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("arguments", [["recipes"], ["recipes", "list"]])
def test_list_shows_every_shipped_recipe_once(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["recipe", "model", "strategy", "data"]
    assert [line.split()[0] for line in lines[1:]] == [path.stem for path in shipped_recipes()]
    assert next(line for line in lines if line.startswith("sft_7b")).split() == [
        "sft_7b", "gemma-7b", "qlora", "data/scheduling_train.jsonl",
    ]  # fmt: skip


def test_show_prints_the_file_or_all_that_it_means(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", "sft_7b"]) == 0
    assert capsys.readouterr().out == (shipped_root() / "recipes" / "sft_7b.yaml").read_text(encoding="utf-8")
    assert main(["recipes", "show", "sft_7b", "--resolved"]) == 0
    Path("all.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_recipe("all.yaml").recipe == load_recipe("sft_7b").recipe


def test_a_copy_is_the_same_recipe_and_is_never_written_over(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "cp", "sft_7b", "mine/own.yaml"]) == 0
    assert capsys.readouterr().out == "mine/own.yaml\n"
    assert load_recipe("mine/own.yaml").recipe == load_recipe("sft_7b").recipe
    assert main(["recipes", "cp", "sft_2b", "mine"]) == 0
    assert Path("mine/sft_2b.yaml").is_file()
    capsys.readouterr()
    assert main(["recipes", "cp", "sft_2b", "mine/own.yaml"]) == 2
    assert capsys.readouterr().err == "mine/own.yaml: exists already; choose another name\n"
    assert main(["recipes", "cp", "sft_2b", "mine/own.yaml/below"]) == 2
    assert capsys.readouterr().err == "mine/own.yaml: cannot be a folder: File exists\n"


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()
