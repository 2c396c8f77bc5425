"""adapter.start: what training can go on from, and that a resumed run goes on from the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_ft.build.inputs import build_tokenizer, inputs_of
from gemma_ft.build.model import build_model
from gemma_ft.errors import UserError
from gemma_ft.recipe.load import LoadedRecipe
from gemma_ft.train.checkpoint_state import load_state
from gemma_ft.train.run import train_recipe
from tests.train.conftest import small_recipe
from tests.train.preference_runs import preference_recipe, write_pairs

Train = Callable[..., list[dict[str, Any]]]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.fixture(scope="module")
def tuned(small_gemma: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of supervised fine-tuning, two steps; not to be changed."""
    out = tmp_path_factory.mktemp("tuned") / "sft"
    assert train_recipe(small_recipe(small_gemma, rows, out, "strategy=lora", "train.max_steps=2")) == 0
    return out


@pytest.fixture
def recipe(small_gemma: Path, pairs: Path, tmp_path: Path) -> Callable[..., LoadedRecipe]:
    def make(*overrides: str) -> LoadedRecipe:
        words = ["strategy=lora", "~adapter.rank", "train.max_steps=4", "checkpoint.every_steps=2"]
        return preference_recipe(small_gemma, pairs, tmp_path / "run", "dpo", *words, *overrides)

    return make


def refused(loaded: LoadedRecipe) -> str:
    with pytest.raises(UserError) as caught:
        build_model(loaded.recipe, build_tokenizer(loaded.recipe))
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_what_cannot_be_gone_on_from(
    recipe: Callable[..., LoadedRecipe], tuned: Path, small_gemma: Path, tmp_path: Path
) -> None:
    adapter = tuned / "adapter"
    (tmp_path / "empty").mkdir()
    for nothing in (tmp_path / "empty", tmp_path / "missing", small_gemma):
        assert refused(recipe(f"adapter.start={nothing}")) == (
            f"adapter.start: {nothing}: no adapter in it; name a run or a PEFT adapter folder"
        )
    whole = tmp_path / "full"
    (whole / "model").mkdir(parents=True)
    shutil.copy(small_gemma / "config.json", whole / "model")
    assert refused(recipe(f"adapter.start={whole}")) == (
        f"adapter.start: {whole}: no adapter in it; it is a whole model: set model.weights to {whole / 'model'}"
    )
    for word, told in (
        ("adapter.rank=8", "adapter.rank: 8, and adapter.start has 4"),
        ("adapter.dora=true", "adapter.dora: true, and adapter.start has false"),
    ):
        assert refused(recipe(f"adapter.start={tuned}", word)) == f"{told}; take it out of the recipe"
    assert refused(recipe(f"adapter.start={tuned}", "adapter.targets=[q_proj]")) == (
        "adapter.targets: other layers than adapter.start has; take it out of the recipe"
    )
    assert refused(recipe(f"adapter.start={_changed(adapter, tmp_path / 'ia3', peft_type='IA3')}")).startswith(
        f"{tmp_path / 'ia3'}"
    )
    saved = _changed(adapter, tmp_path / "more", modules_to_save=["norm"])
    assert refused(recipe(f"adapter.start={saved}")) == (
        f"adapter.start: {saved}: trains more than LoRA's factors (added tokens or whole modules); merge it "
        "(gemma-ft merge), and set model.weights to the result"
    )


def _changed(adapter: Path, folder: Path, **fields: Any) -> Path:
    """A copy of an adapter whose config says otherwise."""
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    return folder


def test_an_adapter_of_another_base_is_refused(
    recipe: Callable[..., LoadedRecipe], tuned: Path, small_gemma: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(small_gemma, other)
    tensors = load_file(str(other / "model.safetensors"))
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, str(other / "model.safetensors"), metadata={"format": "pt"})
    said = refused(recipe(f"adapter.start={tuned}", f"model.weights={other}"))
    assert str(tuned / "adapter") in said
    assert "\n" not in said


def test_a_resumed_run_goes_on_from_the_same_adapter(
    recipe: Callable[..., LoadedRecipe], tuned: Path, train: Train, tmp_path: Path
) -> None:
    """Its hash is kept in each checkpoint: one that changed, or is gone, is refused by its key; and it is an input,
    which --overwrite does not remove.
    """
    start = tmp_path / "start"
    shutil.copytree(tuned, start)
    loaded = recipe(f"adapter.start={start}")
    train(loaded)
    assert str(start / "adapter") in inputs_of(loaded.recipe)
    run = Path(loaded.recipe.output_dir)
    state = load_state(run / "checkpoints" / "step-00000002")["extra"]["inputs"]
    assert len(state["start"]) == 64
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    (run / "summary.json").unlink()
    path = start / "adapter" / WEIGHTS
    (start / "adapter" / "gemma_ft.json").unlink()  # which would tell of a file that is not the one that was saved
    tensors = load_file(str(path))
    first = next(iter(tensors))
    save_file({**tensors, first: tensors[first] + torch.finfo(torch.float32).eps}, str(path), {"format": "pt"})
    with pytest.raises(UserError) as caught:
        train_recipe(loaded, resume=True)
    said = str(caught.value)
    assert said == (
        f"{run}: cannot resume: adapter.start is another adapter than before; restore it, start a new output_dir, or "
        "give --allow-drift start"
    )
    shutil.rmtree(start / "adapter")
    with pytest.raises(UserError) as caught:
        train_recipe(loaded, resume=True)
    assert str(caught.value) == f"adapter.start: {start}: no adapter in it; name a run or a PEFT adapter folder"
    shutil.copytree(tuned / "adapter", start / "adapter")
    assert [line["step"] for line in train(loaded, resume=True)] == [1, 2, 3, 4]


def test_a_run_does_not_overwrite_what_it_goes_on_from(
    recipe: Callable[..., LoadedRecipe], tuned: Path, tmp_path: Path
) -> None:
    start = tmp_path / "run"
    shutil.copytree(tuned, start)
    with pytest.raises(UserError) as caught:
        train_recipe(recipe(f"adapter.start={start}"), overwrite=True)
    assert str(caught.value) == (
        f"{start / 'adapter'}: lies in the run that --overwrite would remove; choose another output_dir"
    )
    assert (start / "adapter" / WEIGHTS).is_file()
