"""The upload: which calls the hub gets, in which order, and one line for everything that can go wrong."""

from __future__ import annotations

import io
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from rich.console import Console

from gemma_ft.errors import UserError
from gemma_ft.export.export import ExportOptions
from gemma_ft.export.push import push
from gemma_ft.ui.export import export_and_show
from tests.export.tuned import TINY, names_in


class FakeHub:
    """The calls of HfApi that are used, recorded; a repository that holds `files` and may be public."""

    def __init__(self, *files: str, private: bool = True, fault: Exception | None = None) -> None:
        self.files, self.private, self.fault = files, private, fault
        self.calls: list[tuple[str, Any]] = []

    def create_repo(self, name: str, **options: Any) -> str:
        self.calls.append(("create_repo", (name, options)))
        if self.fault is not None:
            raise self.fault
        return f"https://huggingface.co/{name}"

    def repo_info(self, name: str, **options: Any) -> Any:
        self.calls.append(("repo_info", (name, options)))
        return SimpleNamespace(private=self.private, siblings=[SimpleNamespace(rfilename=file) for file in self.files])

    def create_commit(self, name: str, operations: list[Any], **options: Any) -> None:
        sent = {one.path_in_repo: Path(one.path_or_fileobj).read_bytes() for one in operations}
        self.calls.append(("create_commit", (name, sent, options)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    for name in ("README.md", "model.safetensors", "stray.txt"):
        (tmp_path / "out" / name).write_text(name)
    return tmp_path / "out"


def refusal(folder: Path, hub: FakeHub, *, name: str = "me/it", files: Any = ("model.safetensors",), **o: Any) -> str:
    with pytest.raises(UserError) as error:
        push(folder, files, name, api=hub, **o)
    return str(error.value)


@pytest.mark.parametrize("public", [False, True])
def test_one_commit_of_the_named_files_to_a_private_repository(public: bool, folder: Path) -> None:
    hub = FakeHub(".gitattributes", private=not public)
    assert push(folder, ["README.md", "model.safetensors"], "me/it", public=public, api=hub) == (
        "https://huggingface.co/me/it"
    )
    sent = {"README.md": b"README.md", "model.safetensors": b"model.safetensors"}
    assert hub.calls == [
        ("create_repo", ("me/it", {"repo_type": "model", "private": not public, "exist_ok": True})),
        ("repo_info", ("me/it", {"repo_type": "model"})),
        ("create_commit", ("me/it", sent, {"commit_message": "Upload from gemma-ft export", "repo_type": "model"})),
    ]


@pytest.mark.parametrize(
    "name", ["it", "me/", "me/it/x", "../it", "me/i t", "me/it.git", "me/--it", "/it", "https://x/y"]
)
def test_what_is_no_name_on_the_hub_is_never_sent(name: str, folder: Path) -> None:
    hub = FakeHub()
    assert refusal(folder, hub, name=name) == f"--push {name}: expected OWNER/NAME of letters, digits, '-', '_' and '.'"
    assert hub.calls == []


def test_a_public_repository_gets_nothing_that_was_meant_to_be_private(folder: Path) -> None:
    hub = FakeHub(private=False)
    assert refusal(folder, hub) == "me/it: is public on the hub; use --public to upload there, or another name"
    assert [call for call, _ in hub.calls] == ["create_repo", "repo_info"]


def test_weights_that_would_stay_beside_ours_are_seen(folder: Path) -> None:
    hub = FakeHub("README.md", "model-00001-of-00002.safetensors")
    assert refusal(folder, hub) == (
        "me/it: holds model-00001-of-00002.safetensors, which would stay beside these weights and be loaded in their "
        "place; delete it there, or use another name"
    )
    push(folder, ["model.safetensors"], "me/it", api=FakeHub("model.safetensors", "x.gguf"))
    (folder / "y.gguf").write_text("y")
    push(folder, ["y.gguf"], "me/it", api=FakeHub("model.safetensors", "x.gguf"))


def http(status: int) -> HfHubHTTPError:
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError(f"{status} Client Error\nmore", response=response)  # type: ignore[arg-type]


NOT_LET = "the hub does not let you write there; set HF_TOKEN to a token that may, or run `hf auth login`"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (LocalTokenNotFoundError("no token"), NOT_LET),
        (http(401), NOT_LET),
        (http(403), NOT_LET),
        (OfflineModeIsEnabled("offline"), "the hub cannot be reached"),
        (ConnectionResetError("reset"), "the hub cannot be reached"),
        (http(500), "the model cannot be uploaded: 500 Client Error"),
        (RuntimeError("first\nsecond"), "the model cannot be uploaded: first"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_every_fault_of_the_hub_is_one_line(fault: Exception, reason: str, folder: Path) -> None:
    again = f"{folder} is complete: hf upload me/it {folder}"
    assert refusal(folder, FakeHub(fault=fault)) == f"me/it: {reason}; {again} --private"
    assert refusal(folder, FakeHub(fault=fault), public=True) == f"me/it: {reason}; {again}"


def test_the_hubs_own_client_without_a_network(folder: Path) -> None:
    with socket.socket() as one:  # nobody listens there once it is closed
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    api: Any = HfApi(endpoint=f"http://127.0.0.1:{port}", token=False)
    assert refusal(folder, api) == (
        f"me/it: the hub cannot be reached; {folder} is complete: hf upload me/it {folder} --private"
    )


def test_an_export_is_sent_when_it_is_complete(tmp_path: Path) -> None:
    hub, console = FakeHub(), Console(file=io.StringIO(), width=120)
    export_and_show(TINY, ExportOptions(to="hf", out=tmp_path / "out", push="me/it"), console=console, api=hub)
    sent = hub.calls[-1][1][1]
    assert sorted(sent) == names_in(tmp_path / "out")
    assert all((tmp_path / "out" / name).read_bytes() == data for name, data in sent.items())
    said = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert said[-1] == "uploaded to https://huggingface.co/me/it (private)"
    assert "# it" in (tmp_path / "out" / "README.md").read_text().splitlines()


def test_a_dry_run_sends_nothing(tmp_path: Path) -> None:
    hub = FakeHub()
    console = Console(file=io.StringIO(), width=120)
    export_and_show(
        TINY, ExportOptions(to="hf", out=tmp_path / "out", push="me/it"), dry_run=True, console=console, api=hub
    )
    assert hub.calls == []
    assert names_in(tmp_path) == []
