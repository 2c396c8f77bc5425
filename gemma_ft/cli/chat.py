"""`gemma-ft chat`: a conversation with a model; lines from a pipe are its questions, one after the other."""

from __future__ import annotations

import io
import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_ft.cli import model_options as options
from gemma_ft.cli.start import check_model

if TYPE_CHECKING:
    from gemma_ft.ui.chat import Screen

LESS_MEMORY = "give --quantize nf4, a lower --max-tokens, or begin anew with /reset"


def chat(
    model: options.Model,
    compare: Annotated[bool, typer.Option("--compare", help="Let the base answer as well, side by side.")] = False,
    system: options.System = None,
    max_tokens: options.MaxTokens = 512,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    adapter: options.Adapter = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = "auto",
) -> int:
    """Talk with a model; /help lists the commands.

    Ctrl-C stops an answer; Ctrl-D, or Ctrl-C twice at the prompt, leaves. Lines from a pipe are questions, and the
    first fault ends them.
    """
    options.check_texts(system, stop)
    check_model(model, adapter, answers=True)
    from gemma_ft.system.environment import quiet_libraries

    quiet_libraries(answering=True)
    from gemma_ft.infer.sampling import Sampling
    from gemma_ft.ui.chat import Repl

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    with options.memory_advice(LESS_MEMORY):
        session = options.open_model(model, adapter, dtype, quantize)
        screen = _screen()
        repl = Repl(
            session,
            screen,
            max_new_tokens=max_tokens,
            sampling=sampling,
            stop=tuple(stop or ()),
            system=system,
            compare=compare,
            quantize=quantize if quantize in ("nf4", "int8") else None,
            around_turn=partial(options.memory_advice, LESS_MEMORY),
        )
        if screen.lasting:
            screen.say(f"{model}: ask something; /help lists the commands, Ctrl-D leaves")
        return repl.run()


def _screen() -> Screen:
    """The terminal, or stdin line by line where it is none."""
    from rich.console import Console

    from gemma_ft.ui.chat import Screen, terminal_reader
    from gemma_ft.ui.compare import compare_view

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that this terminal's encoding lacks is no failure
    lasting = sys.stdin.isatty()
    if lasting:
        _edit_lines()
    console = Console(highlight=False)
    return Screen(
        read=terminal_reader(_asked) if lasting else _next_line,
        write=_write,
        say=lambda text: typer.echo(text, err=True),
        view=lambda: compare_view(console, _write),
        lasting=lasting,
    )


def _edit_lines() -> None:
    """Arrow keys and history where Python has readline; a pasted text of several lines comes as one question."""
    try:
        import readline
    except ImportError:
        return
    readline.parse_and_bind("set enable-bracketed-paste on")


def _asked(prompt: str) -> str:
    """A line typed after `prompt`; the prompt never goes into a file that stdout is sent to."""
    with options.readable_stdin():
        if sys.stdout.isatty():
            return input(prompt)
        sys.stderr.write(prompt)
        sys.stderr.flush()
        return input()


def _next_line() -> str:
    with options.readable_stdin():
        line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
