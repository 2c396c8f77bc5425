"""`gemma-ft generate`: one answer to one prompt on stdout, or a file of answers to a file of rows."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_ft.cli import model_options as options
from gemma_ft.cli.start import check_model
from gemma_ft.errors import DataError, UserError
from gemma_ft.system.paths import given_path

if TYPE_CHECKING:
    from gemma_ft.infer.batch_file import BatchFile, BatchOptions
    from gemma_ft.infer.sampling import Sampling
    from gemma_ft.infer.session import Session

LESS_MEMORY = "lower --batch-size or --max-tokens, or give --quantize nf4"
STDIN = "-"
ROWS_AT_ONCE = 8

Prompt = Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="What to ask; - reads it from stdin.")]
Rows = Annotated[
    str | None, typer.Option("--input", metavar="ROWS", help="Rows to answer, in any format that training reads.")
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", metavar="FILE", help="Their answers, as jsonl; goes on where it stopped.", parser=given_path
    ),
]
Raw = Annotated[bool, typer.Option("--raw", help="Continue plain text instead of answering in a chat.")]
Seed = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="Same seed, same text; rows have 0.", show_default=False)
]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", metavar="N", min=1, help="Rows answered at once; without it: 8.")
]


OF_ROWS = ("--output", "--format", "--column", "--overwrite", "--batch-size")  # options that go with --input


def generate(
    model: options.Model,
    prompt: Prompt = None,
    input: Rows = None,
    output: Output = None,
    system: options.System = None,
    raw: Raw = False,
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: options.Stop = None,
    batch_size: BatchSize = None,
    format: options.Format = None,
    column: options.Column = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start --output again.")] = False,
    adapter: options.Adapter = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = "auto",
) -> int:
    """Answer a prompt, or every row of a file.

    The text alone goes to stdout. A file gets one line for each row: its fields, output, finish (stop or length) and
    index; FILE.settings.json beside it keeps how it was made, so that the same command goes on where one stopped.
    """
    _check_mode(prompt, input, zip(OF_ROWS, (output, format, column, overwrite, batch_size), strict=True))
    options.check_texts(system, stop)
    check_model(model, adapter, answers=True)
    if raw and system:
        raise UserError("--system and --raw: plain text has no system turn; give one of them")
    from gemma_ft.system.environment import quiet_libraries

    quiet_libraries(answering=True)
    from gemma_ft.infer.batch_file import BatchOptions
    from gemma_ft.infer.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    _tell_idle(sampling)
    if prompt is None and seed is None:
        sampling = replace(sampling, seed=0)  # a file of answers can be made again
    batch = BatchOptions(
        max_tokens, sampling, stop or (), system, raw, format or "auto", options.columns_of(column or ())
    )
    opened = partial(options.open_model, model, adapter, dtype, quantize)
    with options.memory_advice(LESS_MEMORY):
        if prompt is not None:
            text = _prompt_text(prompt, raw)
            _answer_one(opened(), text, batch)
            return 0
        work = _work(str(input), Path(str(output)), batch, model, adapter, dtype, quantize)
        _answer_file(partial(opened, max_batch=batch_size or ROWS_AT_ONCE), work, overwrite)
    return 0


def _check_mode(prompt: str | None, rows: str | None, options_of_rows: Iterable[tuple[str, object]]) -> None:
    """Raises UserError unless the options ask for one prompt, or for a file with its output."""
    for_rows = [name for name, value in options_of_rows if value]
    if prompt is None and rows is None:
        raise UserError("nothing to answer: give --prompt TEXT, or --input ROWS with --output FILE")
    if prompt is not None and rows is not None:
        raise UserError("--prompt and --input: one is answered on stdout, the other in --output; give one")
    if prompt is not None and for_rows:
        raise UserError(f"{for_rows[0]}: goes with --input; the answer to --prompt goes to stdout")
    if rows is not None and "--output" not in for_rows:
        raise UserError("--input: needs --output FILE for the answers")


def _tell_idle(sampling: Sampling) -> None:
    """A note where options are given that change nothing about greedy answers."""
    idle = [
        name for name in ("top_k", "top_p", "min_p", "seed") if getattr(sampling, name) != getattr(type(sampling), name)
    ]
    if sampling.greedy and idle:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in idle)
        _tell(f"note: {names} change{'s' if len(idle) == 1 else ''} nothing at temperature 0")


def _prompt_text(prompt: str, raw: bool) -> str:
    """The text of --prompt, or of stdin without its last line end. Raises: UserError when it cannot be asked."""
    from gemma_ft.data.conversation import text_fault

    if prompt == STDIN:
        with options.readable_stdin("--prompt -: "):
            prompt = sys.stdin.read().removesuffix("\n")
    fault = text_fault(prompt)
    if fault:
        raise UserError(f"--prompt: {fault}")
    if not raw and not prompt.strip():
        raise UserError("--prompt: is empty; ask something")
    return prompt


def _answer_one(session: Session, text: str, batch: BatchOptions) -> None:
    """Write the answer to stdout as it comes, a line end after it; control sequences never reach a terminal."""
    from gemma_ft.data.conversation import Turn
    from gemma_ft.infer.prompts import system_turns
    from gemma_ft.system.escape import EscapeStripper

    turns = [*system_turns(session.encoder, batch.system), Turn("user", text)]
    ids = session.completion_ids(text) if batch.raw else session.chat_ids(turns)
    shown = EscapeStripper().feed if sys.stdout.isatty() else str
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that this terminal's encoding lacks is no failure
    pieces = session.stream(ids, max_new_tokens=batch.max_new_tokens, sampling=batch.sampling, stop=batch.stop)
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            finish = end.value
            break
        print(shown(piece), end="", flush=True)
    print(flush=True)
    if finish == "length":
        _tell(f"note: cut at --max-tokens {batch.max_new_tokens}")


def _work(
    rows: str,
    output: Path,
    batch: BatchOptions,
    model: str,
    adapter: Path | None,
    dtype: str | None,
    quantize: str,
) -> BatchFile:
    """The rows to answer, checked before the model is loaded; complaints name options as they are given here."""
    from gemma_ft.build.located import located
    from gemma_ft.build.place import place_of
    from gemma_ft.families.records import family_of
    from gemma_ft.infer.batch_file import BatchFile, identity_of, loading_of

    place = place_of(model, adapter)
    try:
        identity = {**identity_of(place), **loading_of(place, dtype=dtype, quantize=quantize)}
        family = family_of(place.of_base.config.model_type)
        assert family is not None, "the config was read as a Gemma's"
        return BatchFile(located(rows), output, batch, identity, family.chat)
    except DataError as error:
        raise DataError(str(error).replace("data.columns", "--column").replace("data.format", "--format")) from error


def _answer_file(opened: Callable[[], Session], work: BatchFile, overwrite: bool) -> None:
    """Answer what is left of the rows; the model is loaded only where something is."""
    work.file.look(overwrite=overwrite)
    if work.file.done == work.file.total:
        _tell(f"{work.file.path}: all {work.file.total} rows are answered; nothing to do")
        return
    from rich.console import Console

    from gemma_ft.infer.prompts import system_turns
    from gemma_ft.ui.progress import ANSWERS, ConsoleObserver

    session = opened()
    system_turns(session.encoder, work.batch_options.system)  # refused here where the rows' own are not
    for note in work.notes:
        _tell(f"note: {note}")
    if work.file.done:
        _tell(f"{work.file.path}: going on after {work.file.done} of {work.file.total} answers")
    observer = ConsoleObserver(Console(stderr=True), line=ANSWERS, stays=True)
    work.run(session, overwrite=overwrite, observer=observer)
    _tell(f"{work.file.path}: {work.file.total} answers")


def _tell(text: str) -> None:
    typer.echo(text, err=True)
