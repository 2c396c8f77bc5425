"""The recipes that ship: each is short, valid, says how it is started, and its files are there."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gemma_ft
from gemma_ft.recipe.json_schema import json_schema
from gemma_ft.recipe.load import load_recipe
from gemma_ft.recipe.schema import Recipe
from gemma_ft.system.shipped import locate, shipped_recipes, shipped_root

PRESETS = {
    "sft_2b": "gemma-2b",
    "sft_7b": "gemma-7b",
    "sft_gemma2_2b": "gemma-2-2b",
    "sft_gemma2_9b": "gemma-2-9b",
    "sft_gemma2_27b": "gemma-2-27b",
    "sft_gemma3_270m": "gemma-3-270m",
    "sft_gemma3_1b": "gemma-3-1b",
    "sft_gemma3_4b": "gemma-3-4b",
    "sft_gemma3_12b": "gemma-3-12b",
    "sft_gemma3_27b": "gemma-3-27b",
    "sft_tiny": "gemma-tiny",
    "dpo_tiny": "gemma-tiny",
    "reward_tiny": "gemma-tiny",
    "dpo_gemma2_2b": "gemma-2-2b",
    "dpo_gemma3_270m": "gemma-3-270m",
    "orpo_2b": "gemma-2b",
    "reward_gemma2_2b": "gemma-2-2b",
}
OBJECTIVES = {  # of those that are not supervised fine-tuning
    "dpo_tiny": "dpo",
    "reward_tiny": "reward",
    "dpo_gemma2_2b": "dpo",
    "dpo_gemma3_270m": "dpo",
    "orpo_2b": "orpo",
    "reward_gemma2_2b": "reward",
}


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda path: path.stem)
def test_a_shipped_recipe_is_short_valid_and_shows_its_command(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 50
    assert lines[0].startswith(f"# {path.name}: ")
    assert any(
        f"gemma-ft train recipes/{path.name}" in line or "make tiny-base" in line for line in lines if line[0] == "#"
    )
    loaded = load_recipe(path)
    assert loaded.notes == ()
    assert loaded.recipe.output_dir == f"runs/{path.stem}"


@pytest.mark.parametrize(("name", "preset"), PRESETS.items())
@pytest.mark.parametrize("overrides", [[], ["strategy=lora"], ["strategy=full"], ["quantize=int8"]], ids=" ".join)
def test_size_and_strategy_are_each_selectable(name: str, preset: str, overrides: list[str]) -> None:
    recipe = load_recipe(name, overrides).recipe
    assert recipe.model.preset == preset
    assert (recipe.adapter is None) == (recipe.strategy == "full")
    assert (recipe.quantize is None) == (recipe.strategy != "qlora")
    assert all(locate(source.path) for source in recipe.data.train), "a shipped recipe names data that is there"


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda path: path.stem)
def test_a_recipe_of_preferences_is_named_after_its_objective_and_starts_from_what_is_there(path: Path) -> None:
    recipe = load_recipe(path).recipe
    assert recipe.objective.kind == OBJECTIVES.get(path.stem, "sft")
    assert path.stem.startswith((recipe.objective.kind, "tiny_base"))
    if recipe.adapter is not None and recipe.adapter.start is not None:
        assert locate(recipe.adapter.start), "a shipped recipe starts from an adapter that is there"


@pytest.mark.parametrize("kind", ["dpo", "ipo", "orpo", "kto", "simpo"])
def test_the_tiny_recipe_takes_any_objective_of_its_pairs(kind: str) -> None:
    loaded = load_recipe("dpo_tiny", [f"objective.kind={kind}"])
    assert (loaded.recipe.objective.kind, loaded.notes) == (kind, ())


def test_shipped_files_are_found_from_anywhere_and_only_below_their_root(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("data/scheduling_train.jsonl") == shipped_root() / "data" / "scheduling_train.jsonl"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "scheduling_train.jsonl").touch()
    assert locate("data/scheduling_train.jsonl") == Path("data/scheduling_train.jsonl"), "the user's own comes first"
    assert locate("recipes/../..") is None
    assert locate("nowhere") is None
    assert locate("a\0b") is None


def test_an_installed_package_finds_what_it_carries(tmp_path: Path) -> None:
    package = tmp_path / "gemma_ft"
    source = Path(gemma_ft.__file__).parent
    for room in ("recipe", "system", "families", "data/read/formats"):
        shutil.copytree(source / room, package / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(source / "errors.py", package)
    for room in (package, package / "data", package / "data" / "read"):
        (room / "__init__.py").touch()
    shutil.copytree(shipped_root() / "recipes", package / "_shipped" / "recipes")
    script = "from gemma_ft.recipe.load import load_recipe; print(load_recipe('sft_7b').path)"
    # -P and cwd: the checkout must not be what is imported
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {script}"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(run.stdout.strip()) == package / "_shipped" / "recipes" / "sft_7b.yaml"


def test_the_json_schema_describes_every_setting() -> None:
    schema = json_schema()
    json.dumps(schema)
    assert list(schema["properties"]) == ["extends", *Recipe.model_fields]
    for name, block in schema["$defs"].items():
        assert block["additionalProperties"] is False, name
        for key, setting in block["properties"].items():
            assert setting.get("description"), f"{name}.{key} has no description"
    assert {"enum": ["nf4", "int8"]} in schema["properties"]["quantize"]["anyOf"]


def test_sections_stay_within_twelve_settings() -> None:
    for name, block in json_schema()["$defs"].items():
        assert len(block["properties"]) <= 12, name
