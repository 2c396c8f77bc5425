"""docs/recipes.md: its tables are the schema's, and the recipe that it shows is one."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from gemma_ft.recipe.load import load_recipe
from gemma_ft.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "docs" / "recipes_page.py"
SPEC = importlib.util.spec_from_file_location("recipes_page", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
recipes_page = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(recipes_page)
PAGE = recipes_page.PAGE.read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_schema() -> None:
    assert recipes_page.with_tables(PAGE) == PAGE, "python docs/recipes_page.py writes them anew"


def test_every_key_has_its_row() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, re.M)
    sections = [Recipe.model_json_schema(), *Recipe.model_json_schema()["$defs"].values()]
    assert sorted(rows) == sorted(["extends", *(key for section in sections for key in section["properties"])])


def test_the_least_recipe_is_one(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)
    (tmp_path / "least.yaml").write_text(block)
    recipe = load_recipe(tmp_path / "least.yaml").recipe
    assert recipe.model_dump(exclude_unset=True).keys() == {"output_dir", "strategy", "data", "model", "adapter"}
