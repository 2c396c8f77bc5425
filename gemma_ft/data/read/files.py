"""Where rows lie: a file, a folder or pattern of files, compressed or not, on this machine or behind a URL."""

from __future__ import annotations

import contextlib
import difflib
import glob
import gzip
import io
import os
import posixpath
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from gemma_ft.data.read.splits import ALL, DEFAULT, NO_ROWS, Choice, Folder, choose, choose_whole, rows_in
from gemma_ft.errors import DataError, first_line

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
TABLES = (".parquet", ".arrow")  # of them those that are no text
COMPRESSED = (".gz", ".zst")
_CURES = {
    "a spreadsheet; save its sheet as CSV (UTF-8)": (".xlsx", ".xls", ".xlsm", ".ods", ".numbers"),
    "an archive; unpack it, and name the folder": (".zip", ".tar", ".tgz", ".7z", ".rar"),
    "compressed in a way that is not read; unpack it, or compress it with gzip or zstd": (".bz2", ".xz", ".lz4", ".br"),
    "a pickle, which runs code when it is opened; write its rows as .jsonl or .parquet": (".pkl", ".pickle", ".pt"),
    "a database; write its rows as .jsonl or .parquet": (".db", ".sqlite", ".sqlite3", ".duckdb"),
}
OTHER_KINDS = {suffix: cure for cure, suffixes in _CURES.items() for suffix in suffixes}
PATTERN = frozenset("*?[")


@dataclass(frozen=True)
class DataFile:
    """One file of rows: its name as a user finds it, and how its bytes are to be read."""

    name: str
    suffix: str  # one of SUFFIXES
    compression: str  # one of COMPRESSED, or ""
    remote: bool = False

    @property
    def bytes(self) -> int | None:
        """Its size; None for one that is not on this machine, or cannot be asked."""
        try:
            return None if self.remote else os.path.getsize(self.name)
        except OSError:
            return None

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The file's bytes, decompressed. Raises: DataError when they cannot be read, now or on the way."""
        try:
            with _remote(self.name) if self.remote else Path(self.name).open("rb") as raw:
                yield _decompressed(raw, self.compression)
        except DataError:
            raise
        except EOFError as error:
            raise DataError(f"{self.name}: ends in the middle of its compressed data; fetch it again") from error
        except Exception as error:
            if not self.remote and not isinstance(error, OSError | zlib.error):
                raise  # of a URL any: each package has its own kinds
            why = getattr(error, "strerror", None) or first_line(error)
            raise DataError(f"{self.name}: cannot be read: {why}") from error


@dataclass(frozen=True)
class Found:
    """The files of a source, and what is to be told of the splits in its folder ("": nothing)."""

    files: list[DataFile]
    told: str = ""
    parted: bool = False  # whether files of other splits are left out


def files_at(source: str, split: str = DEFAULT) -> list[DataFile] | None:
    """The files that a path, folder, pattern or URL stands for, by name; None when it can be none of them.

    Of a folder whose files name splits (data/read/splits.py) those of one; "folder:config" where its card has several
    configurations. Raises: DataError for a folder or pattern without a file of rows, or a file of another kind.
    """
    found = find_files(source, split)
    return None if found is None else found.files


def find_files(source: str, split: str = DEFAULT) -> Found | None:
    """As `files_at`, with what is to be told."""
    if "://" in source:
        return _remote_files(source, split)
    path, (place, _, config) = Path(source), source.rpartition(":")
    if os.path.isdir(path):  # Path's own raise where a folder may not be entered, or a name is too long
        return _in_folder(source, path, split)
    if os.path.isfile(path):
        return _single(source, split)
    if config and os.path.isdir(place):
        return _in_folder(place, Path(place), split, config)
    if PATTERN & set(source):
        names = [name for name in glob.glob(source, recursive=True) if os.path.isfile(name)]
        chosen = _matched(source, names, split)
        return Found(_some(source, chosen.names, "the pattern"), chosen.told, chosen.parted)
    return None


def kind_of_file(name: str) -> tuple[str, str] | None:
    """(suffix, compression) of a file's name, or None where it is none of rows."""
    path = Path(name.lower())
    compression = path.suffix if path.suffix in COMPRESSED else ""
    suffix = path.with_suffix("").suffix if compression else path.suffix
    return (suffix, compression) if suffix in SUFFIXES else None


def _is_rows(name: str) -> bool:
    return kind_of_file(name) is not None


def known_kinds() -> str:
    """The kinds of files, as a message lists them."""
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, also with {' or '.join(COMPRESSED)} behind it"


def looks_mistyped(source: str) -> bool:
    """Whether a name that is no path here is rather a mistyped path than a hub id."""
    path = Path(source)
    in_a_folder = len(path.parts) > 1 and os.path.isdir(path.parts[0])
    return in_a_folder or kind_of_file(source) is not None or _similar_name(path) is not None


def did_you_mean(source: str) -> str:
    """What to say behind "no such file": that the folder is missing, or a name like it."""
    path = Path(source)
    if not os.path.isdir(path.parent):
        return f"; there is no folder {str(path.parent)!r}"
    similar = _similar_name(path)
    return f"; did you mean {similar!r}?" if similar else ""


def _in_folder(source: str, path: Path, split: str, config: str | None = None) -> Found:
    path = _snapshot_in(path)
    names = [name.relative_to(path).as_posix() for name in _names_in(path)]
    folder = Folder(names, lambda name: _bytes_of(path / name))
    rows = rows_in(folder, _is_rows)
    chosen = choose(source, folder, rows, split, config) if rows else Choice([])
    names = [str(path / name) for name in chosen.names]
    return Found(_some(source, names, "the folder"), chosen.told, chosen.parted)


def _matched(source: str, names: Sequence[str], split: str) -> Choice:
    """The files of rows that a pattern matched: all of them, unless the source names another split than the default."""
    start = os.path.dirname(source[: min(at for one in PATTERN if (at := source.find(one)) >= 0)])
    start = f"{start.rstrip('/')}/" if start else ""
    meant = [name for name in names if _is_rows(name) and posixpath.basename(name) not in NO_ROWS]
    rows = sorted(name.removeprefix(start) for name in meant)
    if split == DEFAULT or not rows:
        chosen = choose_whole(rows)
    else:
        chosen = choose(source, Folder(rows, lambda name: b""), rows, split, None)
    return replace(chosen, names=[start + name for name in chosen.names])


def _single(source: str, split: str, *, remote: bool = False) -> Found:
    if split not in (DEFAULT, ALL):
        raise DataError(f"{source}: no split {split!r} in one file; leave the source's split out")
    return Found([_one(source, remote=remote)])


def _snapshot_in(path: Path) -> Path:
    """The folder itself; of a data set's folder in the hub's cache the snapshot of its main branch."""
    snapshots, main = path / "snapshots", path / "refs" / "main"
    if not (os.path.isdir(snapshots) and os.path.isdir(path / "blobs")):
        return path
    found = sorted(one.name for one in snapshots.iterdir())
    name = _bytes_of(main).decode().strip() if os.path.isfile(main) else None
    if name is None and len(found) == 1:
        (name,) = found
    if name not in found:
        raise DataError(f"{path}: is a folder of the hub's cache; name one of its snapshots: {', '.join(found)}")
    return snapshots / name


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _names_in(folder: Path) -> Iterator[Path]:
    """The files below a folder; what begins with a dot is not meant, as in a pattern."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error

    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _similar_name(path: Path) -> str | None:
    try:
        names = sorted(entry.name for entry in path.parent.iterdir() if kind_of_file(entry.name))
    except OSError:
        return None
    return next(iter(difflib.get_close_matches(path.name, names, n=1, cutoff=0.7)), None)


def _some(source: str, names: Sequence[str], what: str) -> list[DataFile]:
    if not names:
        raise DataError(f"{source}: {what} holds no file of rows ({known_kinds()})")
    return [_one(name) for name in names]


def _one(name: str, *, remote: bool = False) -> DataFile:
    kind = kind_of_file(name)
    if kind is None:
        suffix = Path(name).suffix.lower() or "no suffix"
        held = Path(Path(name.lower()).stem).suffix if suffix in COMPRESSED else suffix
        if held in OTHER_KINDS:
            raise DataError(f"{name}: is {OTHER_KINDS[held]}")
        raise DataError(f"{name}: cannot tell the file type from {suffix!r}; use {known_kinds()}")
    return DataFile(name, *kind, remote=remote)


def _decompressed(raw: Any, compression: str) -> BinaryIO:
    if compression == ".gz":
        return cast(BinaryIO, gzip.open(raw, "rb"))
    if compression == ".zst":
        import pyarrow as pa

        return cast(BinaryIO, io.BufferedReader(pa.input_stream(raw, compression="zstd")))
    return cast(BinaryIO, raw)


def _remote(name: str) -> Any:
    import fsspec

    return fsspec.open(name, "rb").open()


def _remote_files(source: str, split: str) -> Found:
    """The files behind a URL that fsspec knows; a pattern or a folder stands for all in it, of a folder the split."""
    import fsspec

    scheme = source.partition("://")[0]
    try:
        system, path = fsspec.core.url_to_fs(source)
        if PATTERN & set(path):
            chosen = _matched(path, system.glob(path), split)
        elif system.isdir(path):
            whole = {name.removeprefix(f"{path.rstrip('/')}/"): name for name in system.find(path)}
            names = [name for name in whole if not any(part.startswith(".") for part in name.split("/"))]
            folder = Folder(names, lambda name: system.cat_file(whole[name]))
            rows = rows_in(folder, _is_rows)
            chosen = choose(source, folder, rows, split, None) if rows else Choice([])
            chosen = replace(chosen, names=[whole[name] for name in chosen.names])
        elif system.exists(path):
            return _single(source, split, remote=True)
        else:
            raise DataError(f"{source}: no such file")
    except DataError:
        raise
    except ImportError as error:
        raise DataError(f"{source}: {scheme}:// needs a package that is not installed: {first_line(error)}") from error
    except Exception as error:  # each file system has its own: no access, no network, no such bucket
        raise DataError(f"{source}: cannot be read: {first_line(error, kind=True)}") from error
    if not chosen.names:
        raise DataError(f"{source}: holds no file of rows ({known_kinds()})")
    files = [_one(system.unstrip_protocol(name), remote=True) for name in chosen.names]
    return Found(files, chosen.told, chosen.parted)
