"""`~` in a path: read once, here, and as a shell reads it, in every key of a recipe, option and call.

Nothing else in the package expands `~`, and what comes out of here is read alike by libraries that do (transformers'
TrainingArguments) and those that do not.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from gemma_ft.errors import UserError

PathText = str | os.PathLike[str]


def expanded(text: PathText) -> str:
    """A path as it was given, a `~` or `~user` at its beginning replaced by that home folder.

    `./~/x` stays below the current directory, and comes back absolute: pathlib drops `./`, after which it could not be
    told from `~/x`. So does a file whose own name begins with `~`.
    Raises: UserError where the home folder, or such a user, is not known.
    """
    given = os.fspath(text)
    if not given.startswith("~"):
        return os.path.abspath(given) if Path(given).parts[:1] and Path(given).parts[0].startswith("~") else given
    first, slash, _ = given.partition("/")
    try:
        found = os.path.expanduser(given)
    except ValueError:  # no name that a user can have
        found = given
    if found != given or not (slash or first == "~") or os.path.lexists(first):
        return found
    if first == "~":
        raise UserError(f"{given}: the home folder is not known here; give the whole path")
    raise UserError(f"{given}: there is no user {first[1:]!r} here; ./{given} names a folder of that name")


def given_path(text: PathText) -> Path:
    """`expanded` as a Path: what a command line calls for each option that names a file or folder."""
    return Path(expanded(text))


def unexpanded(path: Path) -> Iterator[Path]:
    """Where a path below a home folder would lie if its `~` were the name of a folder in the current directory: where
    gemma-ft wrote the files of a run, all but its checkpoints, before it read `~`.
    """
    try:
        found = sorted(Path.cwd().glob("~*"))
    except OSError:  # the current directory is gone
        return
    for literal in found:
        home = os.path.expanduser(literal.name)
        if home != literal.name and path.is_relative_to(home):
            yield literal / path.relative_to(home)
