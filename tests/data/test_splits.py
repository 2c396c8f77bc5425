"""Folders whose files belong to splits: of each layout that `datasets` 5.2.0 knows (data_files.py), the split asked for
is read, and what is not read is told.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets.data_files import DataFilesDict, get_data_patterns

from gemma_ft.build.sources import described
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.data.read.files import find_files
from gemma_ft.data.read.sources import read_rows
from gemma_ft.errors import DataError
from gemma_ft.recipe.schema import Data, Source

Write = Callable[..., str]
CARD = """---
configs:
- config_name: chats
  default: true
  data_files:
  - {split: train, path: "chats/part-*"}
  - {split: heldout, path: [chats/late.jsonl]}
- config_name: stories
  data_dir: stories
---
# Rows
"""
STORIES = ["chats/part-1.jsonl", "chats/part-2.jsonl", "chats/late.jsonl", "stories/train.jsonl", "stories/dev.jsonl"]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes files into the folder rows; each file of rows holds one, which says its name."""
    monkeypatch.chdir(tmp_path)

    def files(*names: str, **texts: str) -> str:
        for name in names:
            path = Path("rows", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".parquet":
                pyarrow.parquet.write_table(pa.table({"text": [name]}), path)
            else:
                path.write_text(json.dumps({"text": name}) + "\n")
        for name, text in texts.items():
            Path("rows", {"card": "README.md"}.get(name, f"{name}.json")).write_text(text)
        return "rows"

    return files


def read(source: str = "rows", split: str = "train") -> list[str]:
    return [row.fields["text"] for row in read_rows(source, split=split)]


def told(source: str = "rows", split: str = "train") -> str:
    found = find_files(source, split)
    assert found is not None
    return found.told


def refusal(source: str = "rows", split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        read_rows(source, split=split)
    return str(caught.value)


def known_to_datasets(folder: str) -> dict[str, list[str]]:
    """What datasets 5.2.0 takes for the splits of a folder without a card."""
    base = str(Path(folder).resolve())
    found = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
    return {str(split): sorted(str(Path(one).relative_to(base)) for one in files) for split, files in found.items()}


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (
            ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"],
            "split train (1 file); not read: test (1 file)",
        ),
        (["train.jsonl", "test.jsonl"], "split train (1 file); not read: test (1 file)"),
        (
            ["train_0.jsonl", "train_1.jsonl", "my-val.jsonl", "valid.jsonl"],
            "split train (2 files); not read: validation (2 files)",
        ),
        (
            ["training/a.jsonl", "training/b.jsonl", "dev/a.jsonl", "x eval/a.jsonl"],
            "split train (2 files); not read: validation (1 file), test (1 file)",
        ),
        (
            ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/extra-00000-of-00001.jsonl"],
            "split train (2 files); not read: extra (1 file)",
        ),
        (["en/train.jsonl", "de/train.jsonl", "de/evaluation.jsonl"], "split train (2 files); not read: test (1 file)"),
    ],
)
def test_each_split_is_read_alone(write: Write, names: list[str], line: str) -> None:
    """Source: datasets 5.2.0 data_files.get_data_patterns, asked here of the same folder."""
    folder = write(*names)
    for split, files in known_to_datasets(folder).items():
        assert read(folder, split) == files
    assert told(folder) == line
    assert read(folder, "all") == sorted(names)


@pytest.mark.parametrize(
    ("names", "train", "line"),
    [
        (["Test.jsonl", "Train.jsonl"], ["Train.jsonl"], "split train (1 file); not read: test (1 file)"),
        (
            ["TRAINING/a.jsonl", "Dev/a.jsonl", "Rows-Test.jsonl"],
            ["TRAINING/a.jsonl"],
            "split train (1 file); not read: validation (1 file), test (1 file)",
        ),
        (["Latest.jsonl", "Contest.jsonl"], ["Contest.jsonl", "Latest.jsonl"], ""),
        (
            ["train_test_split/test.jsonl", "train_test_split/train.jsonl"],
            ["train_test_split/train.jsonl"],
            "split train (1 file); not read: test (1 file)",
        ),
        (["train-val/a.jsonl"], ["train-val/a.jsonl"], ""),
    ],
)
def test_a_test_set_is_not_trained_where_datasets_would(
    write: Write, names: list[str], train: list[str], line: str
) -> None:
    """datasets 5.2.0 tells capitals apart, and takes a folder named for two splits as both: it trains these test sets,
    and so did a3dff15.
    """
    folder = write(*names)
    assert read(folder) == train
    assert told(folder) == line
    assert known_to_datasets(folder)["train"] != train or not line


def test_no_file_is_told_as_not_read_that_is(write: Write) -> None:
    write("train_test.jsonl", "val.jsonl")
    assert told() == "split train (1 file); not read: validation (1 file)"


def test_a_split_that_is_not_there_is_refused(write: Write) -> None:
    write("train.jsonl", "test.jsonl")
    cure = "set the source's split, or split: all for every file in it"
    assert refusal(split="validation") == f"rows: no split 'validation'; it has train, test; {cure}"
    write("data/test-00000-of-00001.parquet")
    assert refusal() == "rows: no split 'train'; it has test; set the source's split"
    assert refusal("rows/train.jsonl", "test") == (
        "rows/train.jsonl: no split 'test' in one file; leave the source's split out"
    )


def test_files_of_no_split_beside_those_of_one_are_told(write: Write) -> None:
    write("train.jsonl", "test.jsonl", "a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl")
    assert read() == ["train.jsonl"]
    assert told() == "split train (1 file); not read: test (1 file), a.jsonl, b.jsonl, c.jsonl, 1 file more"


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (["a.jsonl", "b.jsonl"], ""),
        (["training_notes.jsonl"], ""),
        (["training_notes.jsonl", "more.jsonl"], ""),  # datasets would leave out the second, and say nothing
        (["my_test_rows.jsonl"], "its files are named as split test, and are all read"),
        (["latest.jsonl", "contest.jsonl", "attest/evaluated.jsonl", "devices/trains.jsonl"], ""),
        (["data/part-00000-of-00002.jsonl", "data/part-00001-of-00002.jsonl"], ""),
        (["data/code-00000-of-00001.jsonl", "data/maths-00000-of-00001.jsonl"], "splits code, maths, all read"),
    ],
)
def test_a_folder_that_tells_no_training_rows_from_others_is_read_whole(
    write: Write, names: list[str], line: str
) -> None:
    """As in the build of before: nothing vanishes because a name holds a word."""
    write(*names)
    assert read() == sorted(names)
    assert told() == line


def test_rows_beside_files_that_are_named_as_a_test_are_not_guessed(write: Write) -> None:
    write("my_test_rows.jsonl", "chats.jsonl")
    cure = "set the source's split, or split: all for every file in it"
    assert refusal() == f"rows: no split 'train'; it has test; {cure}"
    assert read(split="test") == ["my_test_rows.jsonl"]
    assert told(split="test") == "split test (1 file); not read: chats.jsonl"
    assert read(split="all") == ["chats.jsonl", "my_test_rows.jsonl"]
    assert refusal("rows/ch*", "test").startswith("rows/ch*: no split 'test'; its files name none")


def test_a_word_in_the_path_to_the_folder_means_nothing(write: Write) -> None:
    write("test/a/one.jsonl", "test/a/two.jsonl")
    assert read("rows/test/a") == read("rows/test/a/*") == ["test/a/one.jsonl", "test/a/two.jsonl"]
    assert told("rows/test/a") == told("rows/test/a/*.jsonl") == ""


def test_a_pattern_reads_what_it_matches_and_tells_of_splits(write: Write) -> None:
    write("train.jsonl", "test.jsonl")
    assert read("rows/*.jsonl") == ["test.jsonl", "train.jsonl"]
    assert told("rows/*.jsonl") == "splits train, test, all read"
    assert read("rows/*.jsonl", "test") == ["test.jsonl"]


@pytest.mark.parametrize("name", ["dataset_infos", "dataset_info", "state", "config", "tokenizer"])
def test_what_libraries_write_beside_rows_is_no_row(write: Write, name: str) -> None:
    write("a.jsonl", **{name: '{"default": {"splits": 3}}'})
    assert read() == read("rows/*.json*") == ["a.jsonl"]


def test_only_the_libraries_own_names_are_left_out(write: Write) -> None:
    write("a.jsonl", "customer_info.json", "my_state.json")
    assert read() == ["a.jsonl", "customer_info.json", "my_state.json"]


@pytest.mark.parametrize(
    ("source", "split"),
    [("rows", "train"), ("rows", "heldout"), ("rows:chats", "train"), ("rows:stories", "train")],
)
def test_the_configurations_of_a_card(write: Write, source: str, split: str) -> None:
    """Source: datasets 5.2.0 utils/metadata.py, asked here of the same folder."""
    write(*STORIES, card=CARD)
    name, _, config = source.partition(":")
    wanted = datasets.load_dataset_builder(str(Path(name).resolve()), config or None).config.data_files[split]
    assert read(source, split) == sorted(str(Path(one).relative_to(Path("rows").resolve())) for one in wanted)


def test_what_a_card_leaves_open_is_refused(write: Write) -> None:
    write(*STORIES, card=CARD.replace("  default: true\n", ""))
    assert refusal() == "rows: name one of its configurations, as rows:CONFIG; it has chats, stories"
    assert refusal("rows:songs") == "rows: no configuration 'songs'; it has chats, stories"
    assert refusal("rows:chats", "test") == "rows: no split 'test'; it has train, heldout; set the source's split"
    write(card="# a page without a head\n")
    assert read("rows/chats") == ["chats/late.jsonl", "chats/part-1.jsonl", "chats/part-2.jsonl"]
    assert refusal("rows:chats") == "rows: no configuration 'chats'; it has none"


@pytest.mark.parametrize("split", ["train", "test", "mine"])
def test_a_saved_data_set(write: Write, split: str) -> None:
    """Source: datasets 5.2.0 DatasetDict.save_to_disk, read by load_from_disk."""
    one = {name: datasets.Dataset.from_list([{"text": f"{name} {n}"} for n in (1, 2)]) for name in ("train", "test")}
    datasets.DatasetDict({**one, "mine": one["test"].select([1])}).save_to_disk("rows")
    Path("rows", split, "cache-0123456789abcdef.arrow").write_bytes(b"what a map left")
    assert read(split=split) == datasets.load_from_disk("rows")[split]["text"]
    assert read(f"rows/{split}") == datasets.load_from_disk(f"rows/{split}")["text"]
    assert told() == "split train (1 file); not read: test (1 file), mine (1 file)"


def test_shards_that_are_missing_are_told(write: Write) -> None:
    write("data/train-00000-of-00003.jsonl", "data/train-00002-of-00003.jsonl")
    assert told() == "split train (2 files); 2 of the 3 files data/train-*"


def test_a_folder_of_the_hubs_cache_is_its_main_snapshot(tmp_path: Path) -> None:
    """Layout: huggingface_hub 2.4.0, file_download (blobs, refs, snapshots)."""
    folder = tmp_path / "datasets--me--chats"
    for commit in ("a" * 40, "b" * 40):
        place = folder / "snapshots" / commit
        place.mkdir(parents=True)
        (folder / "blobs").mkdir(exist_ok=True)
        (folder / "blobs" / commit).write_text(json.dumps({"text": commit}))
        (place / "train.jsonl").symlink_to(folder / "blobs" / commit)
    assert refusal(str(folder)).endswith(f"name one of its snapshots: {'a' * 40}, {'b' * 40}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("b" * 40)
    assert read(str(folder)) == ["b" * 40]
    assert read(str(folder / "snapshots" / ("a" * 40))) == ["a" * 40]


def test_folders_behind_a_url_have_splits_too() -> None:
    system = fsspec.filesystem("memory")
    for name in ("train.jsonl", "test.jsonl", "dataset_infos.json"):
        system.pipe(f"/parted/{name}", json.dumps({"text": name}).encode())
    assert read("memory://parted") == ["train.jsonl"]
    assert read("memory://parted", "test") == ["test.jsonl"]
    assert told("memory://parted") == "split train (1 file); not read: test (1 file)"
    system.pipe("/parted/README.md", CARD.replace("chats/part-*", "te*.jsonl").encode())
    assert read("memory://parted") == ["test.jsonl"]


def test_the_splits_are_told_with_the_format(write: Write, encoder: ChatEncoder) -> None:
    """That line stands in preview, data check and at the start of train."""
    write("train.jsonl", "test.jsonl")
    source: Any = Source(path="rows")
    assert described(source, Data(train=[source]), encoder).told.endswith(
        "; split train (1 file); not read: test (1 file)"
    )
