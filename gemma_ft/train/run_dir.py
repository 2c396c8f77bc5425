"""The output directory of a run: what lies where, who may write there, and what a resume keeps."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from gemma_ft.errors import LockedError, UserError
from gemma_ft.recipe.load import dump_recipe, parse_recipe
from gemma_ft.recipe.run_files import RunFiles
from gemma_ft.recipe.schema import Recipe
from gemma_ft.system.files import replace_text
from gemma_ft.system.paths import unexpanded
from gemma_ft.train.checkpoint_state import load_state
from gemma_ft.train.checkpoints import checkpoints_of

LOCK = ".lock"
# What a resumed run may change: where and how it is computed, watched and kept, and how long it goes on.
FREE_TO_CHANGE = (
    "output_dir",
    "logging",
    "checkpoint",
    "eval.every_steps",
    "eval.batch_size",
    "eval.samples",
    "eval.canary",
    "train.micro_batch_size",
    "train.gradient_checkpointing",
    "train.max_steps",
    "train.epochs",
)


class RunDir(RunFiles):
    """The files of one run, and the rules of starting, resuming and overwriting it."""

    @property
    def _all(self) -> tuple[Path, ...]:
        """Everything a run writes; recipe.yaml last, for it is what says that the rest is a run's."""
        folders = (self.checkpoints, self.adapter, self.model, self.root / "tensorboard", self.root / "wandb")
        results = (self.summary, self.report, self.eval_results, self.certificate, self.bad_rows)
        return (*results, *self._logs, *folders, self.recipe)

    @property
    def _logs(self) -> tuple[Path, ...]:
        """Files of JSON lines, each with its `step`."""
        return (self.metrics, self.evals, self.samples)

    def trained_tokenizer(self) -> str | None:
        """What the newest checkpoint says of the tokenizer that it was trained with (ContentEncoder.sha256), as far as
        it can be read; whether it is whole is asked where the run goes on from it.
        """
        for _, folder in reversed(checkpoints_of(self.checkpoints)):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                return str(load_state(folder)["extra"]["inputs"]["tokenizer"])
        return None

    def check(self, *, resume: bool, overwrite: bool, inputs: Sequence[str] = ()) -> None:
        """See whether this run may write here, and leave everything as it is. `inputs`: files and folders it reads.

        Raises: UserError when the directory holds a run and neither flag is given, when it cannot be written, when half
        of its files lie elsewhere, or when overwriting would remove what is no run, or what this run reads.
        """
        try:
            present = [path for path in self._all if (path.exists() or path.is_symlink()) and not _is_empty(path)]
            nearest = next(path for path in (self.root.absolute(), *self.root.absolute().parents) if path.exists())
        except OSError as error:
            raise UserError(f"output_dir: {self.root}: {error.strerror}; choose another") from error
        other = next((path for path in unexpanded(self.root) if (path / self.recipe.name).is_file()), None)
        if other is not None and self.recipe not in present:
            raise UserError(
                f"{self.root}: files of this run lie in {other}, where an earlier gemma-ft wrote them; move what is in "
                "that folder here and go on with --resume, or choose another output_dir"
            )
        if present and self.recipe not in present:
            raise UserError(
                f"{self.root}: holds {present[0].name} but no recipe.yaml, so it is not known to be a run; "
                "move it away, or choose another output_dir"
            )
        if present and not resume and not overwrite:
            raise UserError(
                f"{self.root}: already holds a run; use --resume to go on with it, --overwrite to start again, "
                "or another output_dir"
            )
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"output_dir: {self.root}: {nearest} cannot be written to; choose another")
        for text in inputs if overwrite else ():
            if any(Path(text).resolve().is_relative_to(path.resolve()) for path in present):
                raise UserError(f"{text}: lies in the run that --overwrite would remove; choose another output_dir")

    def clear(self) -> None:
        """Remove the run that is here, and nothing else that lies beside it."""
        for path in self._all:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for this process while this is open; the system lets go of it however the process ends.
        Folders that were made for it and stayed empty are gone at its end.

        Raises: LockedError when another process holds it; UserError when it cannot be made.
        """
        made = [path for path in (self.root, *self.root.parents) if not path.exists()]
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise UserError(f"output_dir: {self.root}: cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(handle).st_nlink:  # another process was refused meanwhile, and took its empty folder away
                raise BlockingIOError
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {platform.node()}".encode())
            try:
                yield
            finally:
                self._remove_if_empty(made)
        except BlockingIOError:
            holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
            raise LockedError(
                f"{self.root}: {holder} is writing to it; wait for it to end, or choose another output_dir"
            ) from None
        finally:
            os.close(handle)

    def _remove_if_empty(self, made: Sequence[Path]) -> None:
        """Remove the folders in `made`, the innermost first, where a run was refused before it had written anything."""
        inside = [path for path in self.root.iterdir() if path.name != LOCK] if made else []
        if not made or not all(map(_is_empty, inside)):
            return
        for path in inside:
            path.rmdir()
        (self.root / LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another run may lie beside it by now
            for path in made:
                path.rmdir()

    def check_recipe(self, recipe: Recipe, allowed: Sequence[str] = ()) -> list[str]:
        """Before a resume: the recipe must still describe the run that is here. Returns what changed and is `allowed`:
        keys, or blocks of them.

        Raises: UserError naming every other key that changed and would change the numbers.
        """
        if not self.recipe.exists():
            return []
        try:
            written = yaml.safe_load(self.recipe.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{self.recipe}: cannot be read; restore it, or use --overwrite to start again") from error
        # Of an older version: settings that it did not know have their defaults. Where it is no recipe any more every
        # key that differs is told.
        with contextlib.suppress(TypeError, ValueError):
            written = yaml.safe_load(dump_recipe(parse_recipe(written)))
        before = _flat(written)
        after = _flat(yaml.safe_load(dump_recipe(recipe)))
        changed = {
            key: f"{key} was {before.get(key)!r}, now {after.get(key)!r}"
            for key in sorted({*before, *after})
            if before.get(key) != after.get(key) and not _within(key, FREE_TO_CHANGE)
        }
        refused = [told for key, told in changed.items() if not _within(key, allowed)]
        if refused:
            raise UserError(
                f"{self.root}: cannot resume with another recipe: {'; '.join(refused)}; "
                "restore it, start a new output_dir, or give --allow-drift KEY for each"
            )
        return list(changed.values())

    def write_recipe(self, recipe: Recipe) -> None:
        """Write the resolved recipe; from here on the directory holds a run.

        Raises: UserError when it cannot be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            replace_text(self.recipe, dump_recipe(recipe))
        except OSError as error:
            raise UserError(f"output_dir: {self.root}: cannot be written: {error.strerror}") from error

    def write_bad_rows(self, rows: Sequence[tuple[str, str]], *, add: bool = False) -> None:
        """Write where each row lies that was left out, and why; no file where none was. `add`: to those that are there
        already, each once.
        """
        known = (
            self.bad_rows.read_text(encoding="utf-8").splitlines(keepends=True)
            if add and self.bad_rows.is_file()
            else []
        )
        lines = dict.fromkeys(known + [json.dumps({"where": where, "reason": reason}) + "\n" for where, reason in rows])
        if lines:
            replace_text(self.bad_rows, "".join(lines))
        else:
            self.bad_rows.unlink(missing_ok=True)

    def steps_finished(self) -> int | None:
        """Steps of a run that came to its end, or None."""
        try:
            return int(json.loads(self.summary.read_text(encoding="utf-8"))["steps"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def cut_logs(self, step: int) -> None:
        """Drop from the logs a torn last line and every line past `step`: those steps will be computed again."""
        for path in self._logs:
            if path.exists():
                replace_text(path, "".join(_lines_until(path.read_text(encoding="utf-8").splitlines(), step)))

    def write_samples(self, step: int, lines: Sequence[dict[str, Any]]) -> None:
        """Write the samples of `step`, in place of any that a run that was killed has left there."""
        if lines:
            before = self.samples.read_text(encoding="utf-8").splitlines() if self.samples.exists() else []
            kept = [*_lines_until(before, step - 1), *(json.dumps(line) + "\n" for line in lines)]
            replace_text(self.samples, "".join(kept))


def _is_empty(path: Path) -> bool:
    """Whether a folder holds nothing: a run that ended before it had written anything may leave one."""
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _within(key: str, blocks: Sequence[str]) -> bool:
    """Whether a dotted key is one of some keys, or lies in one of them."""
    return any(f"{key}.".startswith(f"{block}.") for block in blocks)


def append_line(path: Path, figures: dict[str, Any]) -> None:
    """Add one JSON line, floats at full precision; it is with the operating system when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(figures) + "\n")


def _lines_until(lines: Iterable[str], step: int) -> Iterable[str]:
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                yield line + "\n"
        except (ValueError, KeyError, TypeError):
            continue  # torn by a kill: the line was never whole


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: leaf
        for name, child in value.items()
        for key, leaf in _flat(child, f"{prefix}.{name}" if prefix else name).items()
    }
