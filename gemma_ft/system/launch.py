"""Start a verb on several ranks: `accelerate launch` with one of the shipped configs, in this process."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from gemma_ft.errors import Stopped, UserError, first_line
from gemma_ft.system.environment import pass_signals_on
from gemma_ft.system.paths import expanded, given_path
from gemma_ft.system.shipped import shipped_launches


def launch_ranks(config: str, ranks: int | None, arguments: Sequence[str]) -> int:
    """Run `gemma-ft <arguments>` on the ranks of an accelerate config (a file, or a shipped name) and wait for them;
    returns the exit code of the first rank that failed, 0 when none did.

    It is `accelerate launch --config_file CONFIG -m gemma_ft <arguments>`, with a free port and without the launcher's
    own traceback. Raises: UserError for a config that is not there.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    words = ["--config_file", str(find_config(config)), "--main_process_port", "0"]
    words += ["--num_processes", str(ranks)] if ranks is not None else []
    pass_signals_on()
    logging.disable(logging.ERROR)  # the launcher's own account of what the ranks say themselves
    try:
        launch_command(launch_command_parser().parse_args([*words, "-m", "gemma_ft", *arguments]))
    except ChildFailedError as error:
        codes = [failure.exitcode for _, failure in sorted(error.failures.items(), key=lambda item: item[1].timestamp)]
        return next((code for code in codes if code > 0), 1)
    except SignalException:  # handed on to the ranks, which have ended with a checkpoint
        return Stopped.exit_code
    except (ValueError, ConnectionError) as error:  # accelerate's words for configs that cannot be
        raise UserError(f"--launch {config}: {first_line(error)}") from error
    finally:
        logging.disable(logging.NOTSET)
    return 0


def find_config(name: str) -> Path:
    """The file of an accelerate config: a path, or the name of a shipped one. Raises: UserError."""
    if os.path.isfile(expanded(name)):
        return given_path(name)
    shipped = {path.stem: path for path in shipped_launches()}
    if name.removesuffix(".yaml") in shipped:
        return shipped[name.removesuffix(".yaml")]
    near = difflib.get_close_matches(name, shipped, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(shipped)}"
    raise UserError(f"--launch: {name}: no such file, and no shipped config; {hint}")
