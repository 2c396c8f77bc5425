"""Weights & Biases and TensorBoard take the figures when asked, and never stop a run."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_ft.recipe.load import LoadedRecipe

RecipeFor = Callable[..., LoadedRecipe]
Train = Callable[..., list[dict[str, Any]]]


def test_wandb_offline_writes_its_own_files(recipe_for: RecipeFor, train: Train, tmp_path: Path) -> None:
    sampled = ["eval.every_steps=2", "eval.samples=1", "eval.max_new_tokens=2"]
    loaded = recipe_for("strategy=lora", "logging.wandb=offline", *sampled)
    assert len(train(loaded)) == 4
    assert "W&B" not in (tmp_path / "console.txt").read_text()  # nothing it was given was refused
    assert list((Path(loaded.recipe.output_dir) / "wandb").glob("offline-run-*/files/media/table/samples*.json"))
    assert list((Path(loaded.recipe.output_dir) / "wandb").glob("offline-run-*/*.wandb"))


def test_a_dead_wandb_never_stops_a_run(
    recipe_for: RecipeFor, train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket() as probe:  # a port on which nobody listens
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr("gemma_ft.train.trackers.CONNECT_SECONDS", 2)
    assert len(train(recipe_for("strategy=lora", "logging.wandb=online"))) == 4
    assert "going on offline" in (tmp_path / "console.txt").read_text()


def test_tensorboard_writes_event_files(recipe_for: RecipeFor, train: Train) -> None:
    sampled = ["eval.every_steps=2", "eval.samples=1", "eval.max_new_tokens=2"]
    loaded = recipe_for("strategy=lora", "logging.tensorboard=true", *sampled)
    assert len(train(loaded)) == 4
    events = list((Path(loaded.recipe.output_dir) / "tensorboard").iterdir())
    assert len(events) == 1
    assert events[0].read_bytes().count(b"sample 1/text_summary") == 3
