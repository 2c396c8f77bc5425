"""Where rows lie: a file, a folder or pattern of files, compressed or not, on this machine or behind a URL."""

from __future__ import annotations

import contextlib
import difflib
import glob
import gzip
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from gemma_ft.errors import DataError, first_line

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
COMPRESSED = (".gz", ".zst")
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


def files_at(source: str) -> list[DataFile] | None:
    """The files that a path, folder, pattern or URL stands for, by name; None when it can be none of them.

    Raises: DataError for a folder or pattern without a file of rows, or a file of another kind.
    """
    if "://" in source:
        return _remote_files(source)
    path = Path(source)
    if os.path.isdir(path):  # Path's own raise where a folder may not be entered, or a name is too long
        return _some(source, sorted(_names_in(path)), "the folder")
    if os.path.isfile(path):
        return [_one(source)]
    if PATTERN & set(source):
        names = sorted(name for name in glob.glob(source, recursive=True) if os.path.isfile(name))
        return _some(source, [name for name in names if kind_of_file(name)], "the pattern")
    return None


def kind_of_file(name: str) -> tuple[str, str] | None:
    """(suffix, compression) of a file's name, or None where it is none of rows."""
    path = Path(name.lower())
    compression = path.suffix if path.suffix in COMPRESSED else ""
    suffix = path.with_suffix("").suffix if compression else path.suffix
    return (suffix, compression) if suffix in SUFFIXES else None


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


def _names_in(folder: Path) -> Iterator[str]:
    """The files of rows below a folder; what begins with a dot is not meant, as in a pattern."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error

    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (str(Path(place, name)) for name in names if not name.startswith(".") and kind_of_file(name))


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


def _remote_files(source: str) -> list[DataFile]:
    """The files behind a URL that fsspec knows; a pattern or a folder stands for all in it."""
    import fsspec

    scheme = source.partition("://")[0]
    try:
        system, path = fsspec.core.url_to_fs(source)
        if PATTERN & set(path):
            names = [name for name in system.glob(path) if kind_of_file(name)]
        elif system.isdir(path):
            names = [name for name in system.find(path) if kind_of_file(name)]
        elif system.exists(path):
            return [_one(source, remote=True)]
        else:
            raise DataError(f"{source}: no such file")
    except DataError:
        raise
    except ImportError as error:
        raise DataError(f"{source}: {scheme}:// needs a package that is not installed: {first_line(error)}") from error
    except Exception as error:  # each file system has its own: no access, no network, no such bucket
        raise DataError(f"{source}: cannot be read: {first_line(error, kind=True)}") from error
    if not names:
        raise DataError(f"{source}: holds no file of rows ({known_kinds()})")
    return [_one(system.unstrip_protocol(name), remote=True) for name in sorted(names)]
