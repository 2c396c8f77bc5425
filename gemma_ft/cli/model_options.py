"""What generate, chat and serve have in common on the command line: which model, how it is loaded, how it answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gemma_ft.errors import UserError
from gemma_ft.system.paths import given_path

if TYPE_CHECKING:
    import torch

    from gemma_ft.infer.session import Session

DtypeName = Literal["bf16", "float32"]
QuantizeName = Literal["auto", "none", "nf4", "int8"]

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Run directory, adapter, model folder or hub id.")]
Adapter = Annotated[
    Path | None,
    typer.Option(
        "--adapter", metavar="DIR", help="Adapter folder to put on MODEL.", show_default=False, parser=given_path
    ),
]
Dtype = Annotated[
    DtypeName | None,
    typer.Option("--dtype", help="Numbers to compute in; without it: those of training."),
]
Quantize = Annotated[
    QuantizeName,
    typer.Option("--quantize", help="Frozen weights in 4 (nf4) or 8 (int8) bits; auto: as the adapter was trained."),
]

MaxTokens = Annotated[int, typer.Option("--max-tokens", metavar="N", min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[
    float, typer.Option("--temperature", metavar="T", help="0: the likeliest token each time; 1: as the model weighs.")
]
TopK = Annotated[int, typer.Option("--top-k", metavar="K", help="Draw among the K likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option("--top-p", metavar="P", help="Draw among the likeliest that together have P.")]
MinP = Annotated[float, typer.Option("--min-p", metavar="P", help="Leave out what is below P times the likeliest.")]
RepetitionPenalty = Annotated[
    float, typer.Option("--repetition-penalty", metavar="R", help="Above 1: tokens seen before become less likely.")
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Same seed, same text.", show_default=False)]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help="End the answer before this text; may be given several times."),
]
Format = Annotated[
    str | None, typer.Option("--format", metavar="NAME", help="Format of the rows, where it cannot be told.")
]
Column = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="KEY=TEMPLATE", help="Where rows hold what, as in prompt='{question}'."),
]
System = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="System text before the first question.")
]  # fmt: skip


def open_model(
    model: str, adapter: Path | None, dtype: DtypeName | None, quantize: QuantizeName, *, max_batch: int = 1
) -> Session:
    """The session of what the options name, its notes told on stderr. Raises: UserError as `open_session`."""
    from gemma_ft.infer.session import open_session

    session = open_session(
        model,
        dtype=dtype_of(dtype),
        quantize=None if quantize == "none" else quantize,
        adapter=adapter,
        max_batch=max_batch,
    )
    for note in session.notes:
        typer.echo(f"note: {note}", err=True)
    return session


def dtype_of(name: DtypeName | None) -> torch.dtype | None:
    """The torch dtype that --dtype names; None leaves the choice to the session."""
    from gemma_ft.system.hardware import dtype_by_name

    return None if name is None else dtype_by_name(name)


def columns_of(given: Sequence[str]) -> dict[str, str]:
    """What --column says, by key. Raises: UserError."""
    columns = {}
    for text in given:
        key, equals, template = text.partition("=")
        if not equals:
            raise UserError(f"--column {text}: expected KEY=TEMPLATE, such as prompt='{{question}}'")
        columns[key.strip()] = template
    return columns


def check_texts(system: str | None, stop: Sequence[str] | None) -> None:
    """Raises UserError where --system or --stop is given without a text."""
    if system is not None and not system.strip():
        raise UserError("--system: is empty; give a text, or leave it out")
    if "" in (stop or ()):
        raise UserError("--stop: is empty; give a text, or leave it out")


@contextlib.contextmanager
def readable_stdin(where: str = "") -> Iterator[None]:
    """Turns bytes on stdin that are no text into one line that begins with `where`."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{where}stdin is not {error.encoding}: {error.reason}") from error


@contextlib.contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Turns torch's out-of-memory error of a GPU into one line that ends in `advice`."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, known by name: torch is not imported here
            raise
        raise UserError(f"out of GPU memory; {advice}") from error
