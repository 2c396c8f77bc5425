"""What a user reads when the hub refuses or cannot be reached. No network: the libraries' own exceptions are raised."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import httpx
import huggingface_hub
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from gemma_ft.data.encode.tokenizer import load_tokenizer
from gemma_ft.data.read.bad_rows import BadRows
from gemma_ft.data.read.sources import Row, read_chunks, read_rows
from gemma_ft.errors import DataError, UserError

RESPONSE = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))
CUT_OFF = "not in the local cache and the hub cannot be reached; connect once, or name a local path"


def raising(error: Exception) -> Any:
    def call(*args: Any, **kwargs: Any) -> None:
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            GatedRepoError("403", response=RESPONSE),
            "google/gemma-2-2b: this model is gated; accept its terms at https://huggingface.co/google/gemma-2-2b, "
            "then set HF_TOKEN or run `hf auth login`",
        ),
        (LocalEntryNotFoundError("no snapshot"), f"google/gemma-2-2b: {CUT_OFF}"),
        (httpx.ConnectError("[Errno -2] Name or service not known"), f"google/gemma-2-2b: {CUT_OFF}"),
        (
            RepositoryNotFoundError("404", response=RESPONSE),
            "google/gemma-2-2b: no such model on the hub, or it is private; check the name, or set HF_TOKEN",
        ),
        (
            RevisionNotFoundError("404", response=RESPONSE),
            "google/gemma-2-2b: the model has no revision 'v9'; see https://huggingface.co/google/gemma-2-2b/tree/main",
        ),
        (OSError("disk\nfull"), "google/gemma-2-2b: the model cannot be loaded: disk"),
    ],
)
def test_tokenizer_of_the_hub(monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(error))
    with pytest.raises(UserError) as caught:
        load_tokenizer("google/gemma-2-2b", revision="v9")
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub. You must be authenticated."),
            "a/b: this data set is gated; accept its terms at https://huggingface.co/datasets/a/b, "
            "then set HF_TOKEN or run `hf auth login`",
        ),
        (
            DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."),
            "a/b: no such data set on the hub, or it is private; check the name, or set HF_TOKEN",
        ),
        (ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)"), f"a/b: {CUT_OFF}"),
        (
            ValueError(
                "Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']\nEx"
            ),
            "a/b: name one of its configurations, as a/b:CONFIG; it has ['main', 'socratic']",
        ),
        (
            ValueError("BuilderConfig 'x' not found. Available: ['main', 'socratic']"),
            "a/b: name one of its configurations, as a/b:CONFIG; it has ['main', 'socratic']",
        ),
        (
            ValueError("Unknown split \"train\". Should be one of ['test', 'validation']."),
            "a/b: no split 'train'; it has ['test', 'validation']; set the source's split",
        ),
    ],
)
def test_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str) -> None:
    monkeypatch.setattr(datasets, "load_dataset", raising(error))
    with pytest.raises(DataError) as caught:
        read_rows("a/b")
    assert str(caught.value) == expected


def test_a_hub_that_goes_away_on_the_way_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is streamed may fail at any row."""

    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "a"}
        raise ConnectionError("Couldn't reach 'a/b'")

    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("gemma_ft.system.hub.ask_or_go_offline", lambda: None)
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **more: asked.append(more) or rows())
    with pytest.raises(DataError) as caught:
        list(read_chunks("a/b", streaming=True))
    assert str(caught.value) == f"a/b: {CUT_OFF}"
    assert asked[0]["streaming"] is True


def test_rows_of_the_hub_know_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows("owner/name:main", split="test", revision="abc") == [
        Row("owner/name:main[test]:row 1", {"text": "a"}),
        Row("owner/name:main[test]:row 2", {"text": "b"}),
    ]
    assert asked == [(("owner/name", "main"), {"split": "test", "revision": "abc"})]


# Without a network


OLD, NEW = "a" * 40, "b" * 40
Cached = Callable[..., None]


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cached:
    """Puts the files of me/chats into a hub's cache as `hf download --repo-type dataset` leaves them, a snapshot for
    each commit (huggingface_hub 2.4.0, file_download).
    """
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.chdir(tmp_path)

    def put(commit: str, *names: str, ref: str | None = None, card: str | None = None) -> None:
        folder = tmp_path / "hub" / "datasets--me--chats"
        for name in names:
            path = folder / "snapshots" / commit / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"text": f"{commit[:1]} {path.stem}"}) + "\n")
        if card is not None:
            (folder / "snapshots" / commit / "README.md").write_text(card)
        if ref is not None:
            (folder / "refs").mkdir(exist_ok=True)
            (folder / "refs" / ref).write_text(commit)

    return put


def texts(source: str = "me/chats", **asked: Any) -> list[str]:
    return [fields["text"] for chunk in read_chunks(source, **asked) for _, fields in chunk.rows(BadRows())]


def refusal(source: str = "me/chats", **asked: Any) -> str:
    with pytest.raises(DataError) as caught:
        texts(source, **asked)
    return str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_snapshot_in_the_hubs_cache_is_read_offline(cached: Cached, streaming: bool) -> None:
    """As huggingface_hub 2.4.0 snapshot_download finds it; models are found there, too."""
    cached(OLD, "train.jsonl", "test.jsonl", ref="v1")
    cached(NEW, "data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl", ref="main")
    assert texts(streaming=streaming) == ["b train-00000-of-00001"]
    assert texts(streaming=streaming, split="test") == ["b test-00000-of-00001"]
    assert texts(streaming=streaming, revision="v1", split="test") == ["a test"]
    assert texts(streaming=streaming, revision=OLD) == ["a train"]
    (chunk,) = read_chunks("me/chats", streaming=streaming)
    assert chunk.where(0) == "me/chats[train]:row 1"


def test_a_configuration_of_a_snapshot(cached: Cached) -> None:
    configs = [{"config_name": name, "data_files": f"{name}/*.jsonl"} for name in ("one", "two")]
    cached(NEW, "one/a.jsonl", "two/b.jsonl", ref="main", card=f"---\n{json.dumps({'configs': configs})}\n---\n")
    assert texts("me/chats:two") == ["b b"]
    assert refusal() == "me/chats: name one of its configurations, as me/chats:CONFIG; it has ['one', 'two']"


def test_only_what_is_not_there_is_said_to_be_missing(cached: Cached) -> None:
    cached(NEW, "train.jsonl", ref="main")
    assert refusal(split="test") == "me/chats: no split 'test'; it has ['train']; set the source's split"
    assert refusal("me/other") == f"me/other: {CUT_OFF}"
    assert refusal(revision="v9") == f"me/chats: {CUT_OFF}"
    cached(OLD, "notes.md", ref="card")
    assert refusal(revision="card") == f"me/chats: {CUT_OFF}"


def test_a_snapshot_that_is_not_whole_is_refused(cached: Cached) -> None:
    cached(NEW, "data/train-00001-of-00003.jsonl", "data/test-00000-of-00001.jsonl", ref="main")
    assert refusal() == "me/chats: the local cache holds only 1 of the 3 files data/train-*; download the rest"
    assert texts(split="test") == ["b test-00000-of-00001"]


def test_what_datasets_has_prepared_is_of_the_revision_too(cached: Cached, monkeypatch: pytest.MonkeyPatch) -> None:
    """datasets 5.2.0 takes the newest that it has prepared, of whatever revision (load.CachedDatasetModuleFactory)."""
    table = datasets.Dataset.from_list([{"text": "prepared"}])
    table.info.download_checksums = {f"hf://datasets/me/chats@{NEW}/train.jsonl": {}}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **more: table)
    assert texts() == texts(revision=NEW) == texts(revision=NEW[:8]) == texts(revision="main") == ["prepared"]
    assert refusal(revision=OLD) == (
        f"me/chats: revision {OLD!r} is not in the local cache, which has {NEW}; connect once"
    )
