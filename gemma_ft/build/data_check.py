"""The data of a recipe looked through before anything is trained, and cleaned copies of it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from gemma_ft.build.data import build_data
from gemma_ft.build.inputs import build_tokenizer, check_apart
from gemma_ft.build.sources import Described, chunks_of, described
from gemma_ft.data.check.clean import Copy, copy_clean
from gemma_ft.data.check.findings import Severity
from gemma_ft.data.check.preview import Preview, build_preview
from gemma_ft.data.check.rows import RowSource, Side
from gemma_ft.data.check.survey import Report, survey
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.errors import UserError
from gemma_ft.recipe.schema import Recipe, Source
from gemma_ft.system.files import as_json, commit_folder, replace_text
from gemma_ft.system.observer import SILENT, Observer


def check_recipe(recipe: Recipe, out: Path, *, observer: Observer = SILENT) -> Report:
    """What is found in all rows of a recipe's sources, which `write_report` can write to `out`.

    Raises: UserError and its children.
    """
    if out.is_dir():
        raise UserError(f"{out}: is a folder; give a file with --out")
    with observer.job("rows looked at") as job:
        return survey(
            row_sources(recipe),
            max_seq_len=recipe.data.max_seq_len,
            too_long=recipe.data.too_long,
            severities=_severities(recipe),
            skip_bad_rows=recipe.data.on_bad_row == "skip",
            progress=job.advance,
        )


def write_report(report: Report, out: Path) -> None:
    """Write what a check found as JSON. Raises: UserError."""
    try:
        replace_text(out, as_json(report.as_dict()))
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}; choose another --out") from error


def preview_recipe(recipe: Recipe, *, rows: int, row_ids: Sequence[str] = ()) -> Preview:
    """What a recipe would train on, as tokens with counts: the first `rows` examples, or those that hold some rows.

    Raises: DataError, also for a row that is not there.
    """
    data = build_data(recipe, build_tokenizer(recipe))
    return build_preview(
        data.train,
        data.encoder,
        format=data.train_format,
        rows=rows,
        row_ids=row_ids,
        held_out={item.where for item in data.held_out_items},
        global_batch_size=recipe.train.global_batch_size,
        streamed=data.streamed is not None,
    )


def fix_recipe(recipe: Recipe, out: Path, *, observer: Observer = SILENT) -> list[Copy]:
    """Write a cleaned copy of each source of a recipe, and changes.log, to the new folder `out`; it appears complete
    or not at all. Returns the copies.

    Raises: UserError and its children, also when there is something at `out`.
    """
    place = out.resolve()
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise UserError(f"{out}: exists already; choose another --out, or move it away")
    check_apart(recipe, place, named=str(out), cure="choose another --out")
    sources = row_sources(recipe)
    copies: list[Copy] = []

    def write(folder: Path) -> None:
        with observer.job("rows copied") as job:
            copies.extend(copy_clean(sources, folder, job.advance))
        with contextlib.suppress(FileNotFoundError):
            place.rmdir()  # it was empty; what has appeared in it since is not ours to remove

    try:
        commit_folder(place, write, manifest=False, replace=False, go_on="run again")
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}; choose another --out") from error
    return copies


def row_sources(recipe: Recipe) -> list[RowSource]:
    """The sources of a recipe as the data room takes them. Raises: UserError and its children."""
    data = recipe.data
    encoder = ChatEncoder(build_tokenizer(recipe), data.system, data.trained_turns)
    rows = recipe.objective.rows
    found: list[tuple[Side, Source, Described]] = [
        ("train", one, described(one, data, encoder, rows=rows)) for one in data.train
    ]
    held_out = data.eval or ()
    found += [("eval", one, described(one, data, encoder, found[0][2], rows=rows)) for one in held_out]
    return [
        RowSource(side, source.path, partial(chunks_of, source), one.reading, one.why) for side, source, one in found
    ]


def _severities(recipe: Recipe) -> dict[str, Severity]:
    """What weighs otherwise because the recipe says how it is dealt with."""
    weighed: dict[str, Severity] = (
        {"overlap": "note", "prompt_overlap": "note"} if recipe.eval.overlap == "allow" else {}
    )
    return weighed | {"too_long": "error"} if recipe.data.too_long == "error" else weighed
