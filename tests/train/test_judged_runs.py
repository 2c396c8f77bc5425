"""A run whose held-out answers are judged: what it says, what its judge may cost, and that a resumed run executes no
other file than the one it began with.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_ft.errors import UserError
from gemma_ft.recipe.load import LoadedRecipe
from gemma_ft.system.files import file_hash

Recipes = Callable[..., LoadedRecipe]
Train = Callable[..., list[dict[str, Any]]]
SHORT = "def score(prompt, answer, expected):\n    return -len(answer)\n"


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Is it {n}?", "chosen": f"Yes, {n}.", "rejected": f"No, not {n}."} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def judged(recipe_for: Recipes, pairs: Path) -> Recipes:
    def make(judge: str, *more: str) -> LoadedRecipe:
        rows = [f"data.train={pairs}", f"data.eval={pairs}", "eval.generate_rows=3", "eval.max_new_tokens=4"]
        steps = ["train.max_steps=2", "checkpoint.every_steps=1"]
        return recipe_for("objective.kind=dpo", f"objective.judge={judge}", *rows, *steps, *more)

    return make


def said(folder: Path) -> list[str]:
    """What the runs of a test said of their judge."""
    lines = (folder / "console.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.startswith("  judge ")]


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8"))
    return found


def test_a_users_function_judges_the_answers_before_and_after(judged: Recipes, train: Train, tmp_path: Path) -> None:
    file = tmp_path / "judge.py"
    file.write_text(SHORT)
    train(judged(f"{file}:score"))
    found = summary(tmp_path)["win_rate"]
    assert (found["judge"], found["sha256"], found["rows"]) == (f"{file}:score", file_hash(file), 3)
    assert said(tmp_path) == [
        f"judge      {file}:score: {found['value']:.1%} of 3 answers are better than before (ties count half), "
        f"{found['length_controlled']:.1%} at equal lengths; mean length {found['length_before']:.0f} -> "
        f"{found['length_after']:.0f} characters"
    ]


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("def score(prompt, answer, expected):\n    raise KeyError(prompt)\n", "KeyError: 'Is it 0?'; no win rate"),
        ("def score(*texts):\n    return float('inf')\n", "ValueError: gave a number that is not finite; no win rate"),
        ("import sys\ndef score(*texts):\n    sys.exit(3)\n", "SystemExit: 3; no win rate"),
    ],
)
def test_what_a_judge_raises_costs_the_metric_alone(
    code: str, told: str, judged: Recipes, train: Train, tmp_path: Path
) -> None:
    file = tmp_path / "judge.py"
    file.write_text(code)
    train(judged(f"{file}:score"))
    assert said(tmp_path) == [f"judge      {file}:score: {told}"]
    assert "win_rate" not in summary(tmp_path)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_run_goes_on_with_the_same_judge_and_executes_no_other(judged: Recipes, train: Train, tmp_path: Path) -> None:
    file, marker = tmp_path / "judge.py", tmp_path / "marker"
    file.write_text(SHORT)
    train(judged(f"{file}:score"))
    file.write_text(f"open({str(marker)!r}, 'w')\n{SHORT}")
    longer = judged(f"{file}:score", "train.max_steps=3")
    with pytest.raises(UserError) as refused:
        train(longer, resume=True)
    root = tmp_path / "run"
    assert str(refused.value) == (
        f"{root}: cannot resume: the file of objective.judge is another than before; restore it, start a new "
        "output_dir, or give --allow-drift judge"
    )
    assert not marker.exists()
    file.unlink()
    with pytest.raises(UserError) as refused:
        train(longer, resume=True)
    assert str(refused.value) == f"objective.judge: {file}: no such file on this machine; give FILE.py:function"
    file.write_text(SHORT)
    train(longer, resume=True)
    assert summary(tmp_path)["win_rate"]["sha256"] == file_hash(file)
    assert summary(tmp_path)["steps"] == 3


def test_another_judge_in_the_recipe_of_a_resumed_run_is_refused_by_name(
    judged: Recipes, train: Train, tmp_path: Path
) -> None:
    file = tmp_path / "judge.py"
    file.write_text(SHORT)
    train(judged("exact_match"))
    file.write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n{SHORT}")
    with pytest.raises(UserError) as refused:
        train(judged(f"{file}:score", "train.max_steps=3"), resume=True)
    assert "objective.judge" in str(refused.value)
    assert not (tmp_path / "marker").exists()


def test_a_judge_that_cannot_be_asked_is_refused_before_anything_is_written(
    judged: Recipes, train: Train, tmp_path: Path
) -> None:
    file, marker = tmp_path / "judge.py", tmp_path / "marker"
    file.write_text(f"open({str(marker)!r}, 'w')\n{SHORT}")
    with pytest.raises(UserError) as refused:
        train(judged(f"{file}:score", "eval.generate_rows=0"))
    assert str(refused.value) == (
        "objective.judge: there is no held-out answer to judge; set data.eval or data.eval_fraction, and "
        "eval.generate_rows"
    )
    assert not marker.exists()
    with pytest.raises(UserError) as refused:
        train(judged(f"{file}:word"))
    assert str(refused.value) == f"objective.judge: {file} has no function word"
    with pytest.raises(UserError) as refused:
        train(judged(str(file)))
    assert str(refused.value) == f"objective.judge: {file}: names no function of it; give FILE.py:function"
    assert not (tmp_path / "run").exists()
