"""The command `gemma-ft`: its verbs, and what a user sees when one fails.

Every verb is one file that parses, calls one function and prints. torch and transformers are imported inside the verb
function, so that `--help` and completion stay fast.
"""

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Annotated, TextIO

import typer

from gemma_ft import __version__
from gemma_ft.cli import (
    chat,
    checkpoints,
    data,
    export,
    generate,
    import_,
    merge,
    plan,
    preview,
    recipes,
    report,
    schema,
    score,
    serve,
    train,
)
from gemma_ft.cli import eval as evaluation
from gemma_ft.cli.start import collect_late
from gemma_ft.errors import DiskError, UserError, first_line

CRASHED, MISUSED, INTERRUPTED, TERMINATED = 1, 2, 130, 143
LESS_MEMORY = "gemma-ft plan RECIPE --gpu SIZE names the settings that fit"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code; a failure is a plain line on stderr, never a traceback."""
    _open_closed_streams()
    collect_late()
    with _terminable():
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    command = typer.main.get_command(build_app())
    try:
        code = command.main(args=arguments, prog_name="gemma-ft", standalone_mode=False) or 0
        sys.stdout.flush()  # here, where a broken pipe can still be caught
        return _say("interrupted", code) if code == INTERRUPTED else code  # typer keeps an interrupt to itself
    except UserError as error:
        return error.exit_code if error.told else _say(str(error), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        return _say("interrupted", INTERRUPTED)
    except _Terminated:
        return _say("stopped by a signal", TERMINATED)
    except BrokenPipeError:  # the reader of our output left, as `| head` does: nothing to say, and nowhere to say it
        _discard(sys.stdout)
        return CRASHED
    except typer.TyperException as error:
        return _say(_in_one_line(error), MISUSED)
    except Exception as error:
        if getattr(error, "told", False):
            return CRASHED
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return _say(f"{error.filename or 'disk'}: no space left; free some and run again", DiskError.exit_code)
        if type(error).__name__ == "OutOfMemoryError":  # torch's, known by name: torch is not imported here
            return _say(f"out of GPU memory; {LESS_MEMORY}", MISUSED)
        return _say_fault_of_ours(error)


class _Terminated(BaseException):
    """SIGTERM or SIGHUP came: what was begun is cleared away on the way out, as at Ctrl-C."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM and SIGHUP end a verb as an exception does, unless the verb takes them over; python would end on the spot
    and leave half-written folders.
    """
    if threading.current_thread() is not threading.main_thread():  # only there can a signal be waited for
        yield
        return

    def terminate(*_: object) -> None:
        raise _Terminated

    from gemma_ft.system.environment import hangup

    before = {number: signal.signal(number, terminate) for number in (signal.SIGTERM, *hangup())}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def build_app() -> typer.Typer:
    """The typer application with every verb registered."""
    app = typer.Typer(
        name="gemma-ft",
        help="Fine-tune Google's Gemma: one recipe in, a tuned model out.",
        invoke_without_command=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    app.command("train")(train.train)
    app.command("checkpoints")(checkpoints.checkpoints)
    app.command("preview")(preview.preview)
    app.command("plan")(plan.plan)
    app.add_typer(data.build_app(), name="data")
    app.add_typer(recipes.build_app(), name="recipes")
    app.command("schema")(schema.schema)
    app.command("eval")(evaluation.evaluate)
    app.command("merge")(merge.merge)
    app.command("export")(export.export)
    app.command("import")(import_.import_)
    app.command("generate")(generate.generate)
    app.command("score")(score.score)
    app.command("chat")(chat.chat)
    app.command("serve")(serve.serve)
    app.command("report")(report.report)
    return app


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Fine-tune Google's Gemma: one recipe in, a tuned model out."""
    if version:
        print(f"gemma-ft {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def _open_closed_streams() -> None:
    """Nothing is read from, and nowhere written to, a standard stream that was closed before we began."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (open to the end)


def _say(text: str, code: int) -> int:
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # the terminal is gone; the exit code is all that can still be heard
        _discard(sys.stderr)
    return code


def _discard(stream: TextIO) -> None:
    """Let nothing be written to a stream any more, at Python's own end neither."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _in_one_line(error: typer.TyperException) -> str:
    """What is wrong with the command line, in the words of typer, and where its options are shown."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "gemma-ft"
    found = " ".join(error.format_message().split()).removesuffix(".").replace(". Did you", "; did you")
    found = f"{command}: {found}"
    return found if found.endswith("?") else f"{found}; {command} --help shows what it takes"


def _say_fault_of_ours(error: Exception) -> int:
    """One line that takes the blame; the traceback only where it was asked for."""
    from gemma_ft.system.environment import debug_enabled

    if debug_enabled():
        import traceback

        traceback.print_exception(error)
    found = first_line(error, kind=True)[:300]
    return _say(f"a fault of gemma-ft, not of yours: {found} (GEMMA_FT_DEBUG=1 shows the traceback)", CRASHED)
