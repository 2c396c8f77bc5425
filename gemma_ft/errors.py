"""Errors a user can act on: each message is one plain line, each class carries the exit code of the process.

A message says where (file, line, key), what was found and what to do. Several faults found together are several
lines of one error. Anything that is not a `UserError` is a fault of ours: the command line says so and exits with 1.
"""


class UserError(ValueError):
    """Something the user can repair: the command line prints the message as it is and exits with `exit_code`."""

    exit_code = 2
    told = False  # whether somebody else tells it: rank 0, for all ranks


class RecipeError(UserError):
    """The recipe, or an override on the command line, is not valid; one line for each fault, all at once."""


class DataError(UserError):
    """A data set cannot be read, or holds rows that cannot be trained on."""


class CheckpointError(UserError):
    """Checkpoints exist, and none of them can be used."""

    exit_code = 3


class DiskError(UserError):
    """The disk is full, or refuses to be written."""

    exit_code = 4


class NonFiniteError(UserError):
    """Loss, gradients or logits became NaN or infinite."""

    exit_code = 5


class LockedError(UserError):
    """Another run is writing to the same output directory."""

    exit_code = 6


class RankError(UserError):
    """Another rank of the run failed, or is gone; the exit code is its."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Stopped(UserError):
    """A signal or the stop file ended a run that can be resumed; the message says from where."""

    exit_code = 143


class InterruptedWork(UserError):
    """Ctrl-C ended work that can go on later; the message says how."""

    exit_code = 130


def first_line(error: BaseException, *, kind: bool = False) -> str:
    """What a library says, cut at its first line, or at the second where the first is a heading ("Error(s) in ...:");
    its class where it says nothing, or in front of it with `kind`.
    """
    name, lines = type(error).__name__, str(error).strip().splitlines()
    first = " ".join(line.strip() for line in lines[: 2 if lines and lines[0].endswith(":") else 1])
    return f"{name}: {first}" if first and kind else first or name
