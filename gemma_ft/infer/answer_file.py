"""The file of answers: one JSON line for each row, in the rows' order, whole whenever the process ends.

Beside it lies `NAME.settings.json`: what the answers were made of and how, so that only the same work goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from gemma_ft.errors import DiskError, LockedError, UserError
from gemma_ft.system.files import as_json, replace_text

START_AGAIN = "--overwrite starts again, another --output keeps both"


class AnswerFile:
    """A file of up to `total` answers made under `settings`; `index` is the field that holds each row's number.

    As a context it is open for appending and locked against a second writer.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, total: int, index: str) -> None:
        self.path, self.settings, self.total, self.index = path, dict(settings), total, index
        self.settings_path = settings_path(path)
        self.done = 0  # whole lines in the file
        self._bytes = 0  # where the last of them ends
        self._descriptor = -1

    def look(self, *, overwrite: bool) -> None:
        """See how many answers are there (`done`) and whether more may be added; nothing is changed.

        Raises: UserError when the file or its settings cannot be written, or hold what was not made of these rows in
        this way.
        """
        self._check_places()
        self.done, self._bytes = (0, 0) if overwrite or not self.path.exists() else self._whole_lines()
        torn = not overwrite and not self.done and self.path.exists() and self.path.stat().st_size > 0
        if self.done or torn:  # a first answer that was cut off has its settings beside it too
            self._check_settings()
        elif not overwrite and self.settings_path.exists() and not self._settings_are_ours():
            raise UserError(f"{self.settings_path}: exists, and is not ours; another --output leaves it alone")

    def _check_places(self) -> None:
        """Raises UserError where one of the two files cannot be written, or would be through a symbolic link."""
        for path in (self.path, self.settings_path):
            if path.is_symlink():
                raise UserError(f"{path}: is a symbolic link, and none is followed; name another --output")
        if self.path.exists() and not self.path.is_file():
            raise UserError(f"{self.path}: is not a file; name one that can be continued")
        if not self.path.absolute().parent.is_dir():
            raise UserError(f"{self.path}: there is no folder {str(self.path.parent)!r}; make it first")
        if self.settings_path.exists() and not self.settings_path.is_file():
            raise UserError(f"{self.settings_path}: is not a file, and the settings go there; name another --output")
        place = self.path if self.path.exists() else self.path.absolute().parent
        if not os.access(place, os.W_OK):
            raise UserError(f"{self.path}: cannot be written; choose another --output")

    def _whole_lines(self) -> tuple[int, int]:
        """How many answers there are, and where the last one ends; a torn last line does not count."""
        done = end = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break  # a kill or a full disk cut it
                if done == self.total or not self._is_answer(line, done):
                    raise UserError(f"{self.path}:{done + 1}: is not the answer to row {done + 1}; {START_AGAIN}")
                done, end = done + 1, end + len(line)
        return done, end

    def _is_answer(self, line: bytes, number: int) -> bool:
        try:
            found = json.loads(line)
        except ValueError:
            return False
        return isinstance(found, dict) and found.get(self.index) == number

    def _settings_are_ours(self) -> bool:
        """Whether the settings file has what ours have, with whatever values."""
        try:
            found = json.loads(self.settings_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(found, dict) and self.settings.keys() <= found.keys()

    def _check_settings(self) -> None:
        try:
            before = json.loads(self.settings_path.read_text(encoding="utf-8"))
            changed = [key for key, value in self.settings.items() if before.get(key) != value]
        except (OSError, ValueError, AttributeError):
            raise UserError(
                f"{self.path}: exists, and no {self.settings_path.name} says how it was made; {START_AGAIN}"
            ) from None
        if changed:
            told = "; ".join(_change(key, before.get(key), self.settings[key]) for key in changed)
            raise UserError(f"{self.path}: was made otherwise: {told}; {START_AGAIN}")

    def begin(self, *, overwrite: bool) -> AnswerFile:
        """Open the file at the end of its last whole answer; with `overwrite` at its start.

        Raises: UserError as `look`; LockedError when another process writes to it; DiskError.
        """
        self._check_places()  # before an empty file is made
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor = os.open(self.path, flags, 0o666)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.look(overwrite=overwrite)  # again: nobody else writes from here on
            self._cut()
            if not self.done:
                replace_text(self.settings_path, as_json(self.settings))
        except BlockingIOError:
            self.close()
            raise LockedError(f"{self.path}: another process is writing to it; wait for it to end") from None
        except OSError as error:
            self.close()
            raise self._disk_error(error) from error
        except UserError:
            self.close()
            raise
        return self

    def append(self, answer: Mapping[str, Any]) -> None:
        """Add one answer; it is with the operating system when this returns. Raises: DiskError."""
        line = (_as_line(answer) + "\n").encode()
        try:
            written = 0
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError as error:
            raise self._disk_error(error) from error
        self.done, self._bytes = self.done + 1, self._bytes + len(line)

    def close(self) -> None:
        """Close the file; it is on the disk, and ends with a whole line."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._cut()  # what a full disk or an interrupt left of a line
            os.fsync(self._descriptor)
        except OSError as fault:
            if error is None:
                raise self._disk_error(fault) from fault
        finally:
            self.close()

    def _cut(self) -> None:
        os.ftruncate(self._descriptor, self._bytes)
        os.lseek(self._descriptor, self._bytes, os.SEEK_SET)

    def _disk_error(self, error: OSError) -> DiskError:
        return DiskError(
            f"{self.path}: cannot be written: {error.strerror}; {self.done} of {self.total} answers are in it, "
            "the same command goes on from there"
        )


def settings_path(output: Path) -> Path:
    """Where the settings of the answers in `output` lie."""
    return output.with_name(f"{output.name}.settings.json")


def _change(key: str, before: Any, now: Any) -> str:
    """One setting that differs, in words; digests would tell nobody anything."""
    if key in ("rows", "model"):
        return f"the {key} {'was another' if key == 'model' else 'were others'}"
    return f"--{key.replace('_', '-')} was {before!r}, now {now!r}"


def _as_line(answer: Mapping[str, Any]) -> str:
    """One line of JSON, readable where it can be; what JSON has no word for (dates of a table) becomes text."""
    line = json.dumps(answer, ensure_ascii=False, default=str)
    try:
        line.encode()
    except UnicodeEncodeError:  # half a surrogate pair in a field that nobody asked about: kept as it was, escaped
        line = json.dumps(answer, default=str)
    return line
