"""What a user reads when the hub refuses or cannot be reached. No network: the libraries' own exceptions are raised."""

from collections.abc import Iterator
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

from gemma_ft.data.sources import Row, read_chunks, read_rows
from gemma_ft.data.tokenizer import load_tokenizer
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
    monkeypatch.setattr("gemma_ft.data.hub.ask_or_go_offline", lambda: None)
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
