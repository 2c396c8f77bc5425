"""Folders and files that are whole or not there: staged, hashed, synced, renamed.

The `manifest.json` of a folder names every other file with its size and sha256; the folder is valid when all of them
are there and unchanged. What the files hold is decided by the caller.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from gemma_ft.errors import DiskError
from gemma_ft.system.units import byte_size

MANIFEST = "manifest.json"


def commit_folder(
    target: Path,
    write: Callable[[Path], None],
    *,
    manifest: bool = True,
    replace: bool = True,
    bytes_needed: int = 0,
    go_on: str = "use --resume",
) -> None:
    """Make folder `target` appear at once and complete: `write` fills a staging folder beside it, which is then synced
    and renamed. An older `target` is replaced only after the new one is on disk. With `manifest`, hashes are written
    last. Without `replace`, what appeared at `target` meanwhile stays, and the staging folder has a name of its own, so
    that two who write at once leave each other's alone. Whatever `write` raises, the staging folder is gone.

    Raises: DiskError when the disk is full, or has less than `bytes_needed` to begin with; `go_on` says what to do once
    there is space. FileExistsError without `replace`, when `target` is there.
    """
    staging = target.with_name(f".{target.name}{'' if replace else f'.{uuid.uuid4().hex[:8]}'}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        check_space(staging, bytes_needed, go_on=go_on)
        write(staging)
        if manifest:
            write_json(staging / MANIFEST, {name: _fingerprint(staging / name) for name in sorted(_names(staging))})
        for name in _names(staging):
            (staging / name).chmod(staging.stat().st_mode & 0o666)  # safetensors lets only their owner read its files
            _sync(staging / name)
        _sync(staging)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError) and is_disk_full(error):
            raise DiskError(f"{target}: no space left to write it; free some and {go_on}") from error
        raise
    if not replace and (target.is_symlink() or target.exists()):
        shutil.rmtree(staging, ignore_errors=True)
        raise FileExistsError(errno.EEXIST, "exists already", str(target))
    replaced = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    staging.rename(target)
    _sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def check_space(place: Path, bytes_needed: int, *, go_on: str) -> None:
    """Raises: DiskError when the disk of an existing `place` has less than so many bytes left."""
    free = shutil.disk_usage(place).free
    if free < bytes_needed:
        needed, left = (byte_size(size, "GB", ".3g") for size in (bytes_needed, free))
        raise DiskError(f"{place}: {needed} are needed, {left} are free; free some and {go_on}")


def fault_of(folder: Path) -> str | None:
    """Why a folder with a manifest cannot be used, in words; None when every file is there with its size and sha256."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        entries = json.loads(text)
        if text != as_json(entries) or {*entries, MANIFEST} != _names(folder):
            return f"{MANIFEST} is damaged, or does not name the files that are there"
        for name, expected in entries.items():
            if _fingerprint(folder / name) != expected:
                return f"{name} is damaged"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, TypeError):
        return f"{MANIFEST} is damaged"
    return None


def as_json(value: Any) -> str:
    """`value` as indented JSON text, floats at full precision."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> Path:
    """Write `value` as JSON; returns `path`."""
    path.write_text(as_json(value), encoding="utf-8")
    return path


def replace_text(path: Path, text: str) -> None:
    """Write a file so that readers see the old text or the new one, never a part."""
    staging = path.with_name(f".{path.name}.staging")
    try:
        staging.write_text(text, encoding="utf-8")
        _sync(staging)
        os.replace(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_cached(path: Path, *parts: Any) -> None:
    """Make a file of a cache appear whole, of parts that are bytes, and its folder; several may write it at once.
    Nothing is synced: what a machine that goes down loses of it is made again. Raises: OSError.
    """
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            file.writelines(parts)
        aside.replace(path)
    finally:
        with contextlib.suppress(OSError):  # where its folder is none it is not there either
            aside.unlink(missing_ok=True)


def is_disk_full(error: Exception) -> bool:
    """Whether a write failed for want of space or quota; safetensors tells it in its message alone."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in full or any(f"os error {code})" in str(error) for code in full)


def _names(folder: Path) -> set[str]:
    """The files of a folder, as paths below it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def file_hash(path: Path) -> str:
    """SHA-256 (hex) of all bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_hash(path)}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
