"""Runs over streamed rows: the same steps after a resume, nothing lost at a bad row, and what is refused beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from gemma_ft.data.pack import stream as stream_module
from gemma_ft.data.pack.stream import Cursor, Stream
from gemma_ft.errors import DataError, RecipeError, UserError
from gemma_ft.recipe.load import LoadedRecipe
from tests.train.test_resume import Killed, kill_after

RecipeFor = Callable[..., LoadedRecipe]
Train = Callable[..., list[dict[str, Any]]]
STREAM = ["strategy=lora", "data.streaming=true", "data.eval=null", "checkpoint.every_steps=2", "train.max_steps=7",
          "train.schedule=constant", "train.warmup_ratio=0"]  # fmt: skip


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 10 documents: a run of 28 examples reads three."""
    monkeypatch.setattr(stream_module, "BLOCK_DOCUMENTS", 10)
    monkeypatch.setattr(stream_module, "GRAB", 5)
    monkeypatch.setattr("gemma_ft.data.read.chunks.MEAN_ROWS", 2)


def write(path: Path, count: int, bad: tuple[int, ...] = ()) -> Path:
    rows = [{"question": f"{n}?" * (1 + n % 3), "answer": None if n in bad else f"{n}."} for n in range(1, count + 1)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def figures(lines: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(line["step"], line["loss"], line["grad_norm"], line["tokens"]) for line in lines]


@pytest.mark.parametrize(
    ("steps", "packing"),
    [
        (5, "false"),
        (3, "true"),
        pytest.param(3, "false", marks=pytest.mark.slow),
        pytest.param(5, "true", marks=pytest.mark.slow),
    ],
)
def test_resumed_equals_uninterrupted(
    recipe_for: RecipeFor, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str, steps: int
) -> None:
    """Killed at a step within a block, after a checkpoint; what lies before its block is not read again."""
    words = [*STREAM, f"data.train={write(tmp_path / 'a.jsonl', 25)}", f"data.packing={packing}"]
    whole = recipe_for(*words, out="whole")
    expected = figures(train(whole))
    assert len({line[1] for line in expected}) == 7
    with monkeypatch.context() as patch:
        kill_after(patch, steps)
        with pytest.raises(Killed):
            train(recipe_for(*words, out="cut"))
    begun: list[Cursor] = []
    original = Stream.blocks

    def watched(self: Stream, cursor: Cursor) -> Any:
        begun.append(cursor)
        return original(self, cursor)

    monkeypatch.setattr(Stream, "blocks", watched)
    resumed = recipe_for(*words, out="cut")
    assert figures(train(resumed, resume=True)) == expected
    assert len(begun) == 2, "the first block, for the startup lines, and where the checkpoint says"
    assert begun[1].first <= (steps - steps % 2) * 4
    assert steps == 3 or packing == "true" or begun[1].first > 0
    summaries = [json.loads((Path(r.recipe.output_dir) / "summary.json").read_text()) for r in (whole, resumed)]
    for key in ("data", "lengths"):
        assert summaries[0][key] == summaries[1][key]
    folders = (Path(loaded.recipe.output_dir) / "adapter" for loaded in (whole, resumed))
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert all((one[name] == other[name]).all() for name in one)


def test_a_finished_run_goes_on_from_where_it_was(recipe_for: RecipeFor, train: Train, tmp_path: Path) -> None:
    words = [*STREAM, f"data.train={write(tmp_path / 'a.jsonl', 25)}", "data.packing=false"]
    expected = figures(train(recipe_for(*words, out="whole")))
    train(recipe_for(*words, "train.max_steps=5", out="cut"))
    assert figures(train(recipe_for(*words, out="cut"), resume=True)) == expected


def test_a_bad_row_on_the_way_costs_no_step(recipe_for: RecipeFor, train: Train, tmp_path: Path) -> None:
    rows = write(tmp_path / "a.jsonl", 25, bad=(17,))
    loaded = recipe_for(*STREAM, f"data.train={rows}", "data.packing=false", "checkpoint.every_steps=null")
    with pytest.raises(DataError, match=r"a\.jsonl:17: 'answer' is null"):
        train(loaded)
    kept = sorted(path.name for path in (Path(loaded.recipe.output_dir) / "checkpoints").iterdir())
    assert kept in (["step-00000001"], ["step-00000002"])


def test_skipped_rows_are_written_when_they_come(recipe_for: RecipeFor, train: Train, tmp_path: Path) -> None:
    rows = write(tmp_path / "a.jsonl", 25, bad=(17,))
    loaded = recipe_for(*STREAM, f"data.train={rows}", "data.packing=false", "data.on_bad_row=skip")
    train(loaded)
    told = (Path(loaded.recipe.output_dir) / "bad_rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["where"].rpartition(":")[2] for line in told] == ["17"]
    summary = json.loads((Path(loaded.recipe.output_dir) / "summary.json").read_text())
    assert summary["data"]["rows"] >= 24
    assert sum(summary["lengths"]["documents"]) == summary["data"]["documents"]


def test_held_out_rows_are_never_trained(recipe_for: RecipeFor, train: Train, tmp_path: Path) -> None:
    rows, held = write(tmp_path / "a.jsonl", 12), write(tmp_path / "e.jsonl", 6)
    loaded = recipe_for(*STREAM, f"data.train={rows}", f"data.eval={held}", "eval.overlap=error", "data.packing=false",
                        "train.max_steps=3")  # fmt: skip
    train(loaded)
    summary = json.loads((Path(loaded.recipe.output_dir) / "summary.json").read_text())
    assert summary["data"]["overlapping"] >= 6
    assert summary["eval_after"]["loss"] is not None


def test_other_first_rows_are_told_on_a_resume(recipe_for: RecipeFor, train: Train, tmp_path: Path) -> None:
    words = [*STREAM, f"data.train={write(tmp_path / 'a.jsonl', 25)}", "data.packing=false"]
    train(recipe_for(*words, "train.max_steps=2"))
    rows = tmp_path / "a.jsonl"
    rows.write_text(rows.read_text().replace('"1?', '"7?', 1))
    with pytest.raises(UserError, match="gives other training rows than before"):
        train(recipe_for(*words), resume=True)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train.max_steps=null"],
         "train.max_steps: data.streaming: the rows are not counted, so that an epoch has no end; set train.max_steps"),
        (["data.eval_fraction=0.1"],
         "data.eval_fraction: cannot be held out of rows that are streamed; give data.eval"),
    ],
)  # fmt: skip
def test_what_cannot_be_streamed_is_refused(recipe_for: RecipeFor, words: list[str], line: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_for(*STREAM, *words)
    assert str(caught.value).partition(": ")[2] == line
