"""`gemma-ft score`: a file of rewards to a file of rows, by a reward model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemma_ft.cli import model_options as options
from gemma_ft.cli.start import check_model
from gemma_ft.errors import DataError
from gemma_ft.system.paths import given_path

ANSWERS_AT_ONCE = 8
LESS_MEMORY = "lower --batch-size, or give --quantize nf4"

Rows = Annotated[
    str,
    typer.Option(
        "--input", metavar="ROWS", help="Rows of messages, of prompt and completion, or of pairs.", show_default=False
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        "--output", metavar="FILE", help="Their rewards, as jsonl; goes on where it stopped.", show_default=False,
        parser=given_path,
    ),
]  # fmt: skip
BatchSize = Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Answers scored at once.")]


def score(
    model: options.Model,
    input: Rows,
    output: Output,
    batch_size: BatchSize = ANSWERS_AT_ONCE,
    format: options.Format = None,
    column: options.Column = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start --output again.")] = False,
    adapter: options.Adapter = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = "auto",
) -> int:
    """Give every answer of a file its reward.

    A line for each row: its fields, index, and reward; of a pair reward_chosen and reward_rejected, and the share of
    pairs in which the chosen answer has more is shown. FILE.settings.json beside it keeps how it was made.
    """
    check_model(model, adapter)
    columns = options.columns_of(column or ())
    from rich.console import Console

    from gemma_ft.system.environment import quiet_libraries

    quiet_libraries()
    from gemma_ft.build.located import located
    from gemma_ft.build.place import place_of
    from gemma_ft.families.records import FAMILIES
    from gemma_ft.infer.batch_file import identity_of, loading_of
    from gemma_ft.infer.score_file import ScoreFile
    from gemma_ft.infer.scorer import check_scores, open_scorer
    from gemma_ft.ui.reward import score_and_show, show_scores

    place = place_of(model, adapter)
    check_scores(place, adapter or model)
    identity = {**identity_of(place), **loading_of(place, dtype=dtype, quantize=quantize)}
    chat = FAMILIES[place.of_base.config.model_type].chat
    try:
        work = ScoreFile(located(input), output, identity, format=format or "auto", columns=columns, chat=chat)
    except DataError as error:
        raise DataError(str(error).replace("data.columns", "--column").replace("data.format", "--format")) from error
    work.file.look(overwrite=overwrite)
    stdout, file = Console(highlight=False), work.file
    if file.done == file.total:
        show_scores(work, stdout)
        return _tell(f"{file.path}: all {file.total} rows are scored; nothing to do")
    for note in work.notes:
        _tell(f"note: {note}")
    if file.done:
        _tell(f"{file.path}: going on after {file.done} of {file.total} rows")
    with options.memory_advice(LESS_MEMORY):
        stored = None if quantize == "none" else quantize
        scorer = open_scorer(model, dtype=options.dtype_of(dtype), quantize=stored, adapter=adapter)
        shown = {"stdout": stdout, "stderr": Console(stderr=True)}
        score_and_show(work, scorer, batch_size=batch_size, overwrite=overwrite, **shown)
    return _tell(f"{file.path}: {file.total} rows")


def _tell(text: str) -> int:
    """Returns the exit code 0."""
    typer.echo(text, err=True)
    return 0
