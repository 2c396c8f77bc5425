"""A resumed run is the same run: losses, learning rates and final weights, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from gemma_ft.errors import CheckpointError, UserError
from gemma_ft.recipe.load import LoadedRecipe
from gemma_ft.train.checkpoint_state import load_state
from gemma_ft.train.checkpoints import checkpoint_folder
from gemma_ft.train.held_out_objective import HeldOutScore
from gemma_ft.train.run import train_recipe
from gemma_ft.train.trainer import GemmaTrainer
from gemma_ft.ui.training import train_and_show

RecipeFor = Callable[..., LoadedRecipe]
Train = Callable[..., list[dict[str, Any]]]
EXACT = ("step", "loss", "learning_rate", "grad_norm", "tokens")


class Killed(BaseException):
    """Stands for a kill: nothing may catch it and tidy up."""


def kill_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the next run die right after its figures of `step` are written."""
    original = GemmaTrainer._tell_figures

    def tell(self: GemmaTrainer) -> None:
        original(self)
        if self.state.global_step == step:
            monkeypatch.setattr(GemmaTrainer, "_tell_figures", original)
            raise Killed

    monkeypatch.setattr(GemmaTrainer, "_tell_figures", tell)


def exact(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: line[key] for key in EXACT} for line in lines]


# 10 rows in steps of 4: epochs of 3 steps. A kill at 5 resumes inside the second epoch, at 4 on its first step.
@pytest.mark.parametrize(
    ("overrides", "weights", "killed_at"),
    [
        (["quantize=nf4"], "adapter/adapter_model.safetensors", 5),
        (["strategy=lora", "train.precision=bf16"], "adapter/adapter_model.safetensors", 4),
        (["strategy=full"], "model/model.safetensors", 8),
    ],
)
def test_resumed_equals_uninterrupted(
    recipe_for: RecipeFor,
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    weights: str,
    killed_at: int,
) -> None:
    shared = [
        *overrides,
        "adapter.dropout=0.1",
        "train.max_steps=9",
        "checkpoint.every_steps=3",
        "train.schedule=cosine",
    ]
    whole = recipe_for(*shared, out="whole")
    expected = train(whole)
    broken = recipe_for(*shared, out="broken")
    kill_after(monkeypatch, killed_at)
    with pytest.raises(Killed):
        train(broken)
    assert not (Path(broken.recipe.output_dir) / "summary.json").exists()
    with (Path(broken.recipe.output_dir) / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 99, "lo')  # torn by the kill
    assert exact(train(broken, resume=True)) == exact(expected)
    one, other = (load_file(str(Path(run.recipe.output_dir) / weights)) for run in (whole, broken))
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)
    first, second = (json.loads((Path(run.recipe.output_dir) / "summary.json").read_text()) for run in (whole, broken))
    for key in ("steps", "tokens", "train_loss", "eval_before", "eval_after"):
        assert first[key] == second[key], key


def test_resume_without_a_checkpoint_starts_at_step_0(
    recipe_for: RecipeFor, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = recipe_for("strategy=lora")
    kill_after(monkeypatch, 2)
    with pytest.raises(Killed):
        train(loaded)
    assert [line["step"] for line in train(loaded, resume=True)] == [1, 2, 3, 4]


def test_resume_of_an_empty_directory_is_a_fresh_run(recipe_for: RecipeFor, train: Train) -> None:
    assert len(train(recipe_for("strategy=lora"), resume=True)) == 4


def test_resume_of_a_finished_run_says_so(recipe_for: RecipeFor, train: Train, tmp_path: Path) -> None:
    loaded = recipe_for("strategy=lora")
    before = train(loaded)
    assert train(loaded, resume=True) == before
    assert "already finished, 4 steps; nothing to do" in (tmp_path / "console.txt").read_text()


def test_a_run_killed_after_its_last_step_takes_no_step_more(recipe_for: RecipeFor, train: Train) -> None:
    loaded = recipe_for("strategy=lora")
    before = train(loaded)
    out = Path(loaded.recipe.output_dir)
    summary = json.loads((out / "summary.json").read_text())
    adapter = load_file(str(out / "adapter" / "adapter_model.safetensors"))
    (out / "summary.json").unlink()
    shutil.rmtree(out / "adapter")
    assert train(loaded, resume=True) == before
    again = load_file(str(out / "adapter" / "adapter_model.safetensors"))
    assert all((adapter[name] == again[name]).all() for name in adapter)
    for key in ("steps", "tokens", "train_loss", "eval_before", "eval_after"):
        assert json.loads((out / "summary.json").read_text())[key] == summary[key]


def test_a_finished_run_can_go_on_for_longer(recipe_for: RecipeFor, train: Train, tmp_path: Path) -> None:
    train(recipe_for("strategy=lora", "train.schedule=constant"))
    for measured in ("eval.json", "merge.json"):  # of the weights that there were
        (tmp_path / "run" / measured).write_text("{}")
    longer = train(recipe_for("strategy=lora", "train.schedule=constant", "train.max_steps=6"), resume=True)
    whole = train(recipe_for("strategy=lora", "train.schedule=constant", "train.max_steps=6", out="whole"))
    assert exact(longer) == exact(whole)
    assert not (tmp_path / "run" / "eval.json").exists()
    assert not (tmp_path / "run" / "merge.json").exists()
    newest = checkpoint_folder(tmp_path / "run" / "checkpoints", 6)
    assert load_state(newest)["extra"]["total"] == 6


def test_a_damaged_checkpoint_is_passed_over(recipe_for: RecipeFor, train: Train, tmp_path: Path) -> None:
    loaded = recipe_for("strategy=lora", "checkpoint.every_steps=2")
    expected = train(loaded)
    out = Path(loaded.recipe.output_dir)
    (out / "summary.json").unlink()
    newest = checkpoint_folder(out / "checkpoints", 4) / "weights-00000.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    assert exact(train(loaded, resume=True)) == exact(expected)
    said = (tmp_path / "console.txt").read_text().replace("\n", "")
    assert (
        "step-00000004: weights-00000.safetensors is damaged; set aside as step-00000004.damaged, going on from "
        "step-00000002" in said
    )
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000004", "step-00000004.damaged"]


def test_no_intact_checkpoint_is_exit_code_3(recipe_for: RecipeFor, train: Train) -> None:
    loaded = recipe_for("strategy=lora", "checkpoint.every_steps=2")
    train(loaded)
    out = Path(loaded.recipe.output_dir)
    (out / "summary.json").unlink()
    for folder in (out / "checkpoints").iterdir():
        (folder / "optimizer-00000.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        train_recipe(loaded, resume=True)
    root = out / "checkpoints"
    assert str(caught.value) == f"{root}: none of the 2 checkpoints is intact; use --overwrite to start again"
    assert caught.value.exit_code == 3


def test_a_changed_recipe_is_refused(recipe_for: RecipeFor, train: Train) -> None:
    loaded = recipe_for("strategy=lora")
    train(loaded)
    changed = recipe_for("strategy=lora", "train.learning_rate=1e-3", "train.max_steps=9")
    with pytest.raises(UserError) as caught:
        train_recipe(changed, resume=True)
    assert str(caught.value) == (
        f"{loaded.recipe.output_dir}: cannot resume with another recipe: train.learning_rate was 0.002, now 0.001; "
        "restore it, start a new output_dir, or give --allow-drift KEY for each"
    )


def test_a_run_is_not_overwritten_unasked(recipe_for: RecipeFor, train: Train) -> None:
    loaded = recipe_for("strategy=lora")
    train(loaded)
    out = Path(loaded.recipe.output_dir)
    (out / "mine.txt").write_text("keep")
    with pytest.raises(UserError) as caught:
        train_recipe(loaded)
    assert str(caught.value) == (
        f"{out}: already holds a run; use --resume to go on with it, --overwrite to start again, or another output_dir"
    )
    assert len(train(loaded, overwrite=True)) == 4
    assert (out / "mine.txt").read_text() == "keep"


def test_only_the_newest_checkpoints_are_kept(recipe_for: RecipeFor, train: Train) -> None:
    loaded = recipe_for("strategy=lora", "checkpoint.every_steps=1", "checkpoint.keep=2")
    train(loaded)
    kept = sorted(path.name for path in (Path(loaded.recipe.output_dir) / "checkpoints").iterdir())
    assert kept == ["step-00000003", "step-00000004"]


def test_the_best_checkpoint_is_kept_beside_the_newest(
    recipe_for: RecipeFor, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved when it is found, whatever the interval; and again after a resume it is known."""
    scores = map(HeldOutScore, [3.0, 1.0, 2.0, 1.5, 0.5])
    monkeypatch.setattr("gemma_ft.train.trainer.held_out_score", lambda *_: next(scores))
    watched = ["strategy=lora", "eval.every_steps=1", "checkpoint.keep_best=true", "checkpoint.keep=1"]
    loaded = recipe_for(*watched, "checkpoint.every_steps=3", "train.max_steps=4")
    train(loaded)
    root = Path(loaded.recipe.output_dir) / "checkpoints"
    assert sorted(path.name for path in root.iterdir()) == ["step-00000002", "step-00000004"]
    assert load_state(root / "step-00000004")["extra"]["best"] == {"step": 2, "loss": 1.0}
    train(recipe_for(*watched, "checkpoint.every_steps=5", "train.max_steps=5"), resume=True)
    assert sorted(path.name for path in root.iterdir()) == ["step-00000005"]


def test_the_best_of_nothing_is_refused(recipe_for: RecipeFor) -> None:
    with pytest.raises(UserError) as caught:
        recipe_for("checkpoint.keep_best=true")
    assert "checkpoint.keep_best: needs a held-out loss on the way to be the best of; set eval.every_steps" in str(
        caught.value
    )


def test_a_drift_that_is_allowed_goes_on_and_is_told(recipe_for: RecipeFor, train: Train, tmp_path: Path) -> None:
    loaded = recipe_for("strategy=lora", "checkpoint.every_steps=2")
    train(loaded)
    (tmp_path / "run" / "summary.json").unlink()
    changed = recipe_for("strategy=lora", "checkpoint.every_steps=2", "train.learning_rate=1e-3", "train.max_steps=6")
    with (tmp_path / "console.txt").open("w") as sink:
        console = Console(file=sink, width=200)
        with pytest.raises(UserError):
            train_and_show(changed, resume=True, allow_drift=["data", "train.schedule"], console=console)
        assert train_and_show(changed, resume=True, allow_drift=["train.learning_rate"], console=console) == 0
    said = (tmp_path / "console.txt").read_text()
    assert "drift: train.learning_rate was 0.002, now 0.001" in said
    rates = [
        json.loads(line)["learning_rate"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert max(rates[4:]) <= 1e-3 < max(rates[:4])


@pytest.mark.parametrize("strategy", ["full", "lora"])
@pytest.mark.parametrize("optimizer", ["adamw8bit", "lion8bit"])
def test_moments_in_8_bits_are_resumed_to_the_byte(
    recipe_for: RecipeFor, train: Train, monkeypatch: pytest.MonkeyPatch, strategy: str, optimizer: str
) -> None:
    shared = [f"strategy={strategy}", f"train.optimizer={optimizer}", "train.learning_rate=3e-4", "train.max_steps=6",
              "checkpoint.every_steps=2", "adapter.rank=64"]  # fmt: skip
    whole, broken = recipe_for(*shared, out="whole"), recipe_for(*shared, out="broken")
    expected = train(whole)
    kill_after(monkeypatch, 3)
    with pytest.raises(Killed):
        train(broken)
    assert exact(train(broken, resume=True)) == exact(expected)
    one, other = (
        checkpoint_folder(Path(run.recipe.output_dir) / "checkpoints", 6).glob("*.safetensors")
        for run in (whole, broken)
    )
    saved = {path.name: path.read_bytes() for path in one}
    assert saved == {path.name: path.read_bytes() for path in other}
    kinds = {key.partition(":")[0] for key in load_file(str(checkpoint_of(whole)))}
    assert {"step", "state1", "qmap1", "absmax1"} <= kinds


def checkpoint_of(loaded: LoadedRecipe) -> Path:
    """The optimizer's tensors of its last step."""
    return checkpoint_folder(Path(loaded.recipe.output_dir) / "checkpoints", 6) / "optimizer-00000.safetensors"
