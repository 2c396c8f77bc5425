"""Precedence, parents, overrides, and what the strategy does with the blocks it does not use."""

from pathlib import Path

import pytest

from gemma_ft.errors import RecipeError
from gemma_ft.recipe.load import load_recipe, parse_recipe
from gemma_ft.recipe.schema import Adapter, Quantize
from tests.recipe.conftest import GOOD, Write, refusal


def test_what_is_not_set_has_the_default_of_the_schema(write: Write) -> None:
    loaded = load_recipe(write())
    recipe = loaded.recipe
    assert loaded.notes == ()
    assert loaded.path == Path("my.yaml")
    assert (recipe.seed, recipe.data.max_seq_len, recipe.train.learning_rate) == (42, 2048, 2e-4)
    assert recipe.adapter == Adapter(rank=8)
    assert recipe.quantize == Quantize(kind="nf4", double_quant=True)


def test_a_recipe_cannot_be_changed_once_checked(write: Write) -> None:
    recipe = load_recipe(write()).recipe
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.epochs = 3


def test_overrides_win_from_left_to_right_and_blocks_are_merged(write: Write) -> None:
    recipe = load_recipe(
        write(), ["train.epochs=2", "train={epochs: 3, max_steps: 7}", "train.schedule=linear", "~train.max_steps"]
    ).recipe
    assert (recipe.train.epochs, recipe.train.max_steps, recipe.train.schedule) == (3, None, "linear")


def test_a_removed_key_falls_back_to_its_default_and_may_be_absent(write: Write) -> None:
    assert load_recipe(write(), ["~adapter.rank", "~seed", "~eval.max_rows"]).recipe.adapter == Adapter()
    assert refusal("my.yaml", "~adapter") == [
        "my.yaml:2: strategy: qlora needs an adapter block; add one, or set strategy: full"
    ]


def test_text_on_the_command_line_is_taken_as_it_is(write: Write) -> None:
    overrides = ["data.columns.prompt={question}", "data.columns.completion={a.b} and {c}", "logging.run_name=2024"]
    recipe = load_recipe(write(), [*overrides, "model.weights=null", "output_dir=a=b", 'data.train="true"']).recipe
    assert recipe.data.columns == {"prompt": "{question}", "completion": "{a.b} and {c}"}
    assert (recipe.logging.run_name, recipe.model.weights) == ("2024", None)
    assert (recipe.output_dir, recipe.data.train[0].path) == ("a=b", "true")


@pytest.mark.parametrize(
    "overrides", [["quantize=int8"], ["quantize.kind=int8"], ["~quantize", "quantize={kind: int8}"]]
)
def test_quantize_int8_is_shorthand_for_its_kind(write: Write, overrides: list[str]) -> None:
    path = write(GOOD + "quantize: {kind: nf4, double_quant: false}\n")
    expected = Quantize(kind="int8", double_quant="~quantize" in overrides)
    assert load_recipe(path, overrides).recipe.quantize == expected
    assert load_recipe(write(GOOD + "quantize: int8\n")).recipe.quantize == Quantize(kind="int8")


def test_the_strategy_owns_the_blocks(write: Write) -> None:
    path = write(GOOD + "quantize: nf4\n")
    full = load_recipe(path, ["strategy=full"])
    assert (full.recipe.adapter, full.recipe.quantize) == (None, None)
    assert full.notes == (
        "adapter: ignored, strategy full trains all weights",
        "quantize: ignored, strategy full does not quantize",
    )
    lora = load_recipe(path, ["strategy=lora"])
    assert (lora.recipe.adapter, lora.recipe.quantize) == (Adapter(rank=8), None)
    assert lora.notes == ("quantize: ignored, strategy lora does not quantize",)


def test_held_out_rows_that_are_named_win_over_a_fraction(write: Write) -> None:
    loaded = load_recipe(write(), ["data.eval=e.jsonl", "data.eval_fraction=0.1"])
    assert loaded.recipe.data.eval_fraction == 0
    assert loaded.notes == ("data.eval_fraction: ignored, data.eval names the held-out rows",)


def test_extends_merges_blocks_and_points_at_the_file_at_fault(write: Write) -> None:
    write(GOOD + "train: {epochs: 2, max_steps: many}\nseed: x\n", "parents/top.yaml")
    write("extends: top\ntrain: {epochs: 3}\nseed: 7\n", "parents/mid.yaml")
    child = write("extends: parents/mid.yaml\ntrain: {max_steps: 9}\nadapter: {rank: 4}\n", "child.yaml")
    recipe = load_recipe(child).recipe
    assert (recipe.train.epochs, recipe.train.max_steps, recipe.seed, recipe.adapter) == (3, 9, 7, Adapter(rank=4))
    assert refusal("parents/mid.yaml", "train.epochs=-1") == [
        "parents/top.yaml:6: train.max_steps: expected a whole number, got 'many'",
        "command line: train.epochs: must be more than 0, got -1",
    ]


def test_a_key_of_one_source_cannot_be_set_where_there_are_several(write: Write) -> None:
    path = write("extends: sft_tiny\ndata: {train: [a.jsonl, b.jsonl]}\n")
    assert refusal(path, "data.train.max_rows=5") == [
        "command line: data.train: there are 2 sources, so that this does not say which; give the whole list"
    ]
    assert load_recipe(path, ["data.train=c.jsonl", "data.train.max_rows=5"]).recipe.data.train[0].max_rows == 5


def test_a_fault_is_where_the_value_in_force_was_written(write: Write) -> None:
    path = write(GOOD + "train:\n  global_batch_size: 30\n")
    text = "train.global_batch_size: {} is not a multiple of micro_batch_size 4; use micro_batch_size {}"
    assert refusal(path)[0].startswith("my.yaml:7: " + text.format(30, "3 or 5"))
    assert refusal(path, "train.global_batch_size=31")[0].startswith("command line: " + text.format(31, "1 or 31"))
    fault = "train.global_batch_size: 32 is not a multiple of micro_batch_size 5"
    assert refusal(path, "train=", "train.micro_batch_size=5")[0].startswith(f"command line: {fault}")
    assert refusal(path, "~train.global_batch_size", "train.micro_batch_size=5")[0].startswith(f"my.yaml:6: {fault}")


def test_extends_finds_shipped_recipes(write: Write) -> None:
    child = write("extends: sft_2b\noutput_dir: runs/mine\nmodel: {preset: gemma-7b}\n")
    recipe = load_recipe(child).recipe
    assert (recipe.output_dir, recipe.model.preset, recipe.strategy) == ("runs/mine", "gemma-7b", "qlora")


def test_faults_of_extends(write: Write) -> None:
    write("extends: b.yaml\n", "a.yaml")
    write("seed: 1\nextends: a.yaml\n", "b.yaml")
    assert refusal("a.yaml") == ["b.yaml:2: extends: 'a.yaml' leads back to itself"]
    write("extends: [a, b]\n", "c.yaml")
    assert refusal("c.yaml") == ["c.yaml:1: extends: expected one recipe, got a list"]
    write("extends: sft_2\n", "d.yaml")
    assert refusal("d.yaml")[0].startswith("d.yaml:1: extends: 'sft_2': no such recipe; did you mean 'sft_")


def test_yaml_1_2_scalars(write: Write) -> None:
    path = write(GOOD + "train: {learning_rate: 2e-4, epochs: 1e1}\nlogging: {project: on, run_name: no}\nseed: 0x1F\n")
    recipe = load_recipe(path).recipe
    assert (recipe.train.learning_rate, recipe.train.epochs, recipe.seed) == (2e-4, 10, 31)
    assert (recipe.logging.project, recipe.logging.run_name) == ("on", "no")
    assert load_recipe(path, ["logging.project=1_000", "seed=0o17"]).recipe.seed == 15


def test_names_of_shipped_recipes_are_found_from_anywhere(write: Write) -> None:
    write()
    for name in ("sft_tiny", "sft_tiny.yaml", "recipes/sft_tiny.yaml", "recipes/sft_tiny"):
        assert load_recipe(name).recipe.model.preset == "gemma-tiny"
    write(GOOD, "sft_tiny.yaml")
    assert load_recipe("sft_tiny").recipe.model.preset == "gemma-2-2b", "a user's own file comes first"


def test_plain_values_make_a_recipe_too() -> None:
    values = {"output_dir": "r", "strategy": "lora", "data": {"train": "a"}, "model": {"preset": "gemma-2b"}}
    assert parse_recipe({**values, "adapter": {}, "quantize": "int8"}).quantize is None
    with pytest.raises(RecipeError, match=r"^recipe: strategy: lora needs an adapter block"):
        parse_recipe(values)
