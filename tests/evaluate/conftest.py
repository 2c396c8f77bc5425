"""Runs that were finished, and a tiny Gemma that lm-evaluation-harness asks."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_ft.build.pretrained import load_model, load_tokenizer
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.evaluate.harness import Tasks
from gemma_ft.families.chat_template import TURNS
from gemma_ft.recipe.load import load_recipe
from gemma_ft.system import environment
from gemma_ft.system.shipped import shipped_root
from gemma_ft.train.run import train_recipe

Run = Callable[..., Path]


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve requests of the shipped task."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = (shipped_root() / "data" / "scheduling_eval.jsonl").read_text().splitlines()[:12]
    path.write_text("\n".join(lines) + "\n")
    return path


def overrides(rows: Path, out: Path, *more: str) -> list[str]:
    return [
        f"output_dir={out}", f"data.train={rows}", f"data.eval={rows}", "eval.overlap=allow",
        "data.max_seq_len=160", "train.max_steps=3",
        "train.learning_rate=0.003", "eval.max_rows=8", "eval.generate_rows=3", "eval.max_new_tokens=40",
        "eval.batch_size=4", "adapter.rank=4", "checkpoint.every_steps=null", *more,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def trained(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of a strategy, made once."""
    made: dict[str, Path] = {}

    def make(strategy: str) -> Path:
        if strategy not in made:
            made[strategy] = tmp_path_factory.mktemp("runs") / strategy
            loaded = load_recipe("sft_tiny", overrides(rows, made[strategy], f"strategy={strategy}"))
            assert train_recipe(loaded) == 0
        return made[strategy]

    return make


CONTEXT = 96  # of the model under test: some requests have to be cut, and long texts roll
CHOICES = [" late", " early in the morning", " A", " B"]  # the last two are one token each
OPEN = [
    "Set up a review on Sunday at 11:45. Thanks",
    "Set up a review on Sunday at 11:45. Thanks Thanks",
    "What is the",
    "We meet on Monday at",
    "again " * 100 + "We meet on Monday at",
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "choice": [
        {"question": f"The meeting is on day {n}. It is" + " very" * (35 * n), "choices": CHOICES, "gold": n}
        for n in range(4)
    ]
    + [{"question": "", "choices": CHOICES, "gold": 0}, {"question": "Well, ", "choices": CHOICES, "gold": 1}],
    "rolling": [{"text": "The dog met Anna at noon. " * repeats} for repeats in (1, 7, 25)] + [{"text": ""}],
    "open": [{"question": question, "answer": "Done."} for question in OPEN],
}
SPECIFIC: dict[str, dict[str, Any]] = {
    "choice": {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
               "doc_to_target": "{{gold}}", "metric_list": [{"metric": "acc"}]},
    "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
                "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}]},
    "open": {"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
             "generation_kwargs": {"until": ["\n", " team", TURNS.end_of_turn], "max_gen_toks": 10},
             "metric_list": [{"metric": "exact_match"}]},
}  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Gemma with a short context."""
    place = tmp_path_factory.mktemp("model") / "gemma"
    shutil.copytree(shipped_root() / "data" / "gemma-tiny", place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT}))
    return place


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of each kind; JSON is YAML."""
    place = tmp_path_factory.mktemp("tasks")
    for name, rows in ROWS.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_task(place, f"local_{name}", place / f"{name}.jsonl", SPECIFIC[name])
    return place


def write_task(folder: Path, name: str, data: Path, specific: dict[str, Any]) -> None:
    shared = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
              "test_split": "test"}  # fmt: skip
    (folder / f"{name}.yaml").write_text(json.dumps({**shared, **specific}))


@pytest.fixture(scope="session")
def encoder(folder: Path) -> ChatEncoder:
    return ChatEncoder(load_tokenizer(folder))


@pytest.fixture(scope="session")
def model(folder: Path) -> Any:
    return load_model(folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def requests(task_folder: Path, encoder: ChatEncoder) -> dict[str, list[Any]]:
    """The harness's own requests, by task."""
    tasks = Tasks([f"local_{name}" for name in ROWS], path=task_folder, limit=None, chat=False)
    assert tasks.requests(encoder, context=CONTEXT) == 24 + 4 + 5
    return {name: task.instances for name, task in tasks._loaded["tasks"].items()}


@pytest.fixture(scope="module")
def offline() -> Any:
    """Any attempt to reach another machine is an error."""
    patch = pytest.MonkeyPatch()

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"a connection was opened: {arguments}")

    patch.setattr(socket.socket, "connect", refuse)
    patch.setattr(socket, "getaddrinfo", refuse)
    environment.quiet_libraries()
    yield
    patch.undo()
