"""Scores, samples and canary on the way: they are written, they are right, and training cannot tell they were made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from gemma_ft.recipe.load import LoadedRecipe
from gemma_ft.train.evaluation import longer_than_training
from tests.train.test_resume import Killed, exact, kill_after

RecipeFor = Callable[..., LoadedRecipe]
Train = Callable[..., list[dict[str, Any]]]
WATCHED = ["eval.every_steps=2", "eval.samples=2", "eval.canary=data/canary.jsonl", "eval.max_new_tokens=4"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# dropout draws from the random state that an evaluation must not touch
@pytest.mark.parametrize(
    ("overrides", "weights"),
    [
        (["quantize=nf4", "adapter.dropout=0.2"], "adapter/adapter_model.safetensors"),
        pytest.param(["strategy=full"], "model/model.safetensors", marks=pytest.mark.slow),
    ],
)
def test_training_is_the_same_with_and_without(
    recipe_for: RecipeFor, train: Train, overrides: list[str], weights: str
) -> None:
    shared = [*overrides, "train.max_steps=3", "eval.max_rows=4"]
    plain = recipe_for(*shared, out="plain")
    watched = recipe_for(*shared, *WATCHED, "eval.every_steps=1", out="watched")
    assert exact(train(plain)) == exact(train(watched))
    one, other = (load_file(str(Path(run.recipe.output_dir) / weights)) for run in (plain, watched))
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)


def test_what_is_written_on_the_way(recipe_for: RecipeFor, train: Train, tmp_path: Path, rows: Path) -> None:
    loaded = recipe_for("strategy=lora", *WATCHED, "train.max_steps=5")
    train(loaded, page=True)
    out = Path(loaded.recipe.output_dir)
    summary = json.loads((out / "summary.json").read_text())
    evals = lines(out / "evals.jsonl")
    assert [list(line) for line in evals] == [
        ["step", "eval_loss", "gain", "canary_loss", "canary_base_loss", "forgetting"]
    ] * 3
    assert [line["step"] for line in evals] == [2, 4, 5]
    before = summary["eval_before"]["loss"]
    for line in [*evals, {"eval_loss": summary["eval_after"]["loss"], **summary}]:
        assert line["gain"] == before - line["eval_loss"] > 0
        assert line["forgetting"] == line["canary_loss"] - line["canary_base_loss"] != 0
    # the adapter's output is zero before training: its base has one loss, whenever it is asked
    assert len({line["canary_base_loss"] for line in [*evals, summary]}) == 1
    samples = lines(out / "samples.jsonl")
    assert [line["step"] for line in samples] == [0, 0, 2, 2, 4, 4, 5, 5]
    asked = [json.loads(line) for line in rows.read_text().splitlines()[:2]]
    for line, row in zip(samples, asked * 4, strict=True):
        assert (line["prompt"], line["expected"]) == (row["question"], row["answer"])
    for number, sample in enumerate(summary["samples"]):  # generate_rows is 0: they are those that were sampled
        assert (sample["before"], sample["after"]) == (samples[number]["answer"], samples[6 + number]["answer"])
    said = (tmp_path / "console.txt").read_text()
    assert "  canary     data/canary.jsonl: 32 general rows, to see what is forgotten" in said
    assert f"  report   {out / 'report.html'}" in said
    assert (out / "report.html").read_text().startswith("<!doctype html>")


def test_a_resumed_run_writes_the_same(
    recipe_for: RecipeFor, train: Train, monkeypatch: pytest.MonkeyPatch, rows: Path, tmp_path: Path
) -> None:
    """Also for full fine-tuning, whose base is gone when the run is resumed."""
    shared = ["strategy=full", *WATCHED, f"eval.canary={rows}", "eval.max_rows=4", "checkpoint.every_steps=2"]
    whole, broken = recipe_for(*shared, out="whole"), recipe_for(*shared, out="broken")
    train(whole)
    kill_after(monkeypatch, 3)
    with pytest.raises(Killed):
        train(broken)
    with (tmp_path / "broken" / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "prompt": "of a run that went further"}) + '\n{"step": 9, "pro')
    train(broken, resume=True)
    (tmp_path / "broken" / "summary.json").unlink()
    # as if killed after its last step: scored again, and nothing stands there twice
    train(broken, resume=True, page=True)
    for name in ("evals.jsonl", "samples.jsonl"):
        assert lines(tmp_path / "whole" / name) == lines(tmp_path / "broken" / name), name
    one, other = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "broken"))
    for key in ("gain", "canary_loss", "canary_base_loss", "forgetting", "samples"):
        assert one[key] == other[key], key
    assert one["forgetting"] is not None
    page = tmp_path / "broken" / "report.html"
    page.write_text("mine now")
    train(broken, resume=True, page=True)  # already finished: nothing is written again
    assert page.read_text() == "mine now"


def test_another_canary_has_another_base(recipe_for: RecipeFor, train: Train, rows: Path, tmp_path: Path) -> None:
    """A resume may watch something else; a full run then has no base to compare with, and says so by null."""
    train(recipe_for("strategy=full", *WATCHED, "train.max_steps=2"))
    train(
        recipe_for("strategy=full", *WATCHED, f"eval.canary={rows}", "eval.samples=1", "train.max_steps=3"), resume=True
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["canary_loss"] > 0
    assert summary["canary_base_loss"] is summary["forgetting"] is summary["forgetting_note"] is None


def test_a_report_that_fails_does_not_fail_the_run(
    recipe_for: RecipeFor, train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("no ink")

    monkeypatch.setattr("gemma_ft.ui.training.write_report", broken)
    monkeypatch.setattr("gemma_ft.train.summary.forgetting_note", lambda *_: "forgetting: much")
    train(recipe_for("strategy=lora", "train.max_steps=1"), page=True)
    said = (tmp_path / "console.txt").read_text()
    assert "report.html could not be made (ZeroDivisionError: no ink); the run is complete\n" in said
    assert "  warning  forgetting: much\n" in said
    assert (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "report.html").exists()
    assert not (tmp_path / "run" / "samples.jsonl").exists()


def test_overwrite_removes_what_these_wrote(recipe_for: RecipeFor, train: Train, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(recipe_for("strategy=lora", *WATCHED, "train.max_steps=1"))
    for name in ("eval.json", "merge.json"):
        (out / name).write_text("{}")
    train(recipe_for("strategy=lora", "train.max_steps=1"), overwrite=True, page=True)
    assert sorted(path.name for path in out.iterdir()) == [
        ".lock", "adapter", "checkpoints", "metrics.jsonl", "recipe.yaml", "report.html", "summary.json"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("scoring", "step", "steps", "told"),
    [
        (59.0, 0.1, 10, None),
        (300.0, 1.0, 301, None),
        (
            300.0,
            1.0,
            299,
            "scoring held-out rows took 5 min 00 s, and does so again at the end; the 299 steps of training take about "
            "4 min 59 s: lower eval.max_rows and eval.generate_rows",
        ),
    ],
)
def test_scoring_that_is_longer_than_training_is_told(
    scoring: float, step: float, steps: int, told: str | None
) -> None:
    assert longer_than_training(scoring, step, steps) == told
