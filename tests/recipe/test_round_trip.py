"""Laws of the loader: what is written is read back equal, and no text makes a traceback."""

import contextlib
import tempfile
from pathlib import Path

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_ft.errors import RecipeError
from gemma_ft.recipe.load import dump_recipe, load_recipe, parse_recipe
from gemma_ft.recipe.schema import Recipe
from gemma_ft.recipe.validate import annotation_at
from gemma_ft.recipe.yaml_marks import Dumper, read_yaml

PRINTABLE = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=30)
WORDLIKE = st.sampled_from(
    ["no", "on", "1e3", "0o17", "0x1", ".5", "1.", "null", "~", "true", "<<", "1_000", "12:30", "=", "-"]
)
TEXT = PRINTABLE | WORDLIKE
SCALAR = TEXT | st.integers() | st.floats() | st.booleans() | st.none()
VALUES = st.recursive(SCALAR, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXT, v, max_size=3), max_leaves=8)
KEYS = list(Recipe.model_fields)
PATHS = KEYS + [f"{key}.{sub}" for key in KEYS for sub in getattr(annotation_at((key,)), "model_fields", {})]
ASSIGNMENTS = st.builds(
    "{}={}".format, st.sampled_from(PATHS) | st.text(max_size=10), VALUES.map(str) | st.text(max_size=20)
)


def load_text(text: str, overrides: list[str]) -> Recipe:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return load_recipe(path, overrides).recipe


@given(output=TEXT, columns=st.dictionaries(st.sampled_from(["prompt", "completion", "text"]), TEXT),
       rate=st.floats(1e-300, 1), steps=st.none() | st.integers(1, 10**8),
       strategy=st.sampled_from(["full", "lora", "qlora"]),
       targets=st.just("all-linear") | st.lists(st.sampled_from(["q_proj", "up_proj"]), min_size=1))  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_a_dumped_recipe_loads_equal(output, columns, rate, steps, strategy, targets) -> None:
    recipe = parse_recipe({
        "output_dir": output, "strategy": strategy, "data": {"train": output, "columns": columns},
        "model": {"preset": "gemma-2b", "weights": output}, "adapter": {"targets": targets},
        "train": {"learning_rate": rate, "max_steps": steps}, "eval": {"max_rows": None},
    })  # fmt: skip
    assert load_text(dump_recipe(recipe), []) == recipe


@given(VALUES)
@settings(max_examples=300, deadline=None)
def test_values_survive_our_yaml(value) -> None:
    document = read_yaml(yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True), "t")
    assert not document.faults
    assert repr(document.value) == repr(value)  # repr: nan is equal to itself there


@given(st.text(max_size=200) | st.text("[]{}:,-&*!|>'\"%@`#?~<=\n\t 0aé\x85", max_size=80))
@settings(max_examples=500, deadline=None)
def test_any_text_is_a_recipe_or_a_plain_refusal(text: str) -> None:
    with contextlib.suppress(RecipeError):
        load_text(text, [])


@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6))
@settings(max_examples=300, deadline=None)
def test_any_values_are_a_recipe_or_a_plain_refusal(values) -> None:
    with contextlib.suppress(RecipeError):
        load_text(yaml.dump(values, Dumper=Dumper, allow_unicode=True), [])


@given(st.lists(ASSIGNMENTS | st.sampled_from(PATHS).map("~{}".format) | st.text(max_size=10), max_size=4))
@settings(max_examples=300, deadline=None)
def test_any_overrides_are_applied_or_plainly_refused(overrides: list[str]) -> None:
    with contextlib.suppress(RecipeError):
        load_recipe("sft_2b", overrides)
