"""`gemma-ft data` as a person sees it: what a check found, and what a fix did."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gemma_ft.build.data_check import check_recipe, fix_recipe, write_report
from gemma_ft.data.check.clean import CHANGES, Copy
from gemma_ft.data.check.findings import Finding, FindingPlace
from gemma_ft.data.check.preview_tokens import visible
from gemma_ft.data.check.survey import Report
from gemma_ft.data.pack.stats import unread_line
from gemma_ft.recipe.schema import Recipe
from gemma_ft.ui.progress import ConsoleObserver, say

PLACES_SHOWN = 3
BAD_ROWS_SHOWN = 20
STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def check_and_show(recipe: Recipe, out: Path, *, strict: bool, console: Console) -> int:
    """Look at all rows of a recipe's sources, print what was found, write it to the file `out` as JSON.

    Returns 2 when there is an error (`strict`: or a warning), else 0. Raises: UserError and its children.
    """
    report = check_recipe(recipe, out, observer=ConsoleObserver(console))
    show_report(report, console)
    write_report(report, out)
    say(console, f"report: {out}")
    return 2 if report.findings.worst() in ("error", *(["warning"] if strict else [])) else 0


def fix_and_show(recipe: Recipe, out: Path, *, console: Console) -> None:
    """Write cleaned copies of a recipe's sources to the new folder `out`, and print what became of each.

    Raises: UserError and its children.
    """
    show_copies(fix_recipe(recipe, out, observer=ConsoleObserver(console)), out, console)


def show_report(report: Report, console: Console) -> None:
    """What was read, a table of all kinds that were found, and the first bad rows."""
    for source in report.sources:
        share = source.trained_tokens / max(source.tokens, 1)
        told = f"{source.rows:,} rows, {source.tokens:,} tokens, {share:.0%} trained ({source.format}: {source.why})"
        _say(console, f"{source.side:5}  {source.name}: {told}")
        if source.unread:
            _say(console, f"       {unread_line(source.unread)}")
    for line in report.preferences.describe() if report.preferences else ():
        _say(console, line)
    found = report.findings.all()
    if found:
        table = Table("severity", "rows", "what, and what to do", "where")
        table.columns[1].justify = "right"
        table.columns[3].overflow = "fold"
        for finding in found:
            table.add_row(*_line(finding))
        console.print(table)
    bad = report.findings["bad_row"]
    for place in bad.places[:BAD_ROWS_SHOWN]:
        _say(console, str(place))
    if len(bad.places) > BAD_ROWS_SHOWN:
        _say(console, f"... and {len(bad.places) - BAD_ROWS_SHOWN:,} more bad rows")
    if not found:
        _say(console, "nothing found")


def show_copies(copies: Sequence[Copy], out: Path, console: Console) -> None:
    """What became of each source, and where the copies and the list of changes are."""
    for copy in copies:
        path = out / copy.name
        _say(console, f"{copy.source.name}: {copy.rows:,} rows -> {copy.kept:,} in {path}")
        for reason, count in copy.left_out.items():
            _say(console, f"  {count:,} left out: {reason}")
    _say(console, f"every change: {out / CHANGES}")
    names = [
        f"data.{side}={out / copies_of[0].name}"
        for side in ("train", "eval")
        if len(copies_of := [copy for copy in copies if copy.source.side == side]) == 1
    ]
    _say(console, f"to use them: {' '.join(names)}" if names else "to use them, name them in the recipe")


def _line(finding: Finding) -> tuple[Text, str, Text, Text]:
    what = Text.assemble(finding.kind.title, "\n", (finding.kind.advice, "dim"))
    places = [_short(place) for place in finding.places[:PLACES_SHOWN]]
    if finding.kind.name == "bad_row":  # what is wrong with them stands below
        places = [_short(FindingPlace(place.where)) for place in finding.places[:PLACES_SHOWN]]
    return Text(finding.severity, STYLES[finding.severity]), f"{finding.count:,}", what, Text("\n".join(places))


def _short(place: FindingPlace) -> str:
    """Without folders: the report has them."""
    where, twin = (whole.rpartition("/")[2] for whole in (place.where, place.twin))
    return visible(str(FindingPlace(where, place.detail, twin)))


def _say(console: Console, text: str) -> None:
    say(console, visible(text))
